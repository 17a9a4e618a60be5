"""Fill docs/measurements.md: every row is one `fate generate`, its command beside it.

    python scripts/measure.py --out docs/measurements.md

Replaces what stands between the markers `<!-- measure:NAME -->` and `<!-- /measure:NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
TOKENS = 128
SHARES = ("25%", "50%", "75%")
PAPER = "fate, always guessing"
SETTINGS = {
    "tuned": "",
    "tuned, always guessing": "--window 99",
    PAPER: "--policy fate --window 99",
    "demand": "--policy demand",
    "demand, LRU, even": "--policy demand --cache lru --allocation even",
}
MIB = 2**20


def run(options: str) -> tuple[str, dict[str, Any]]:
    """Run one command; return it as a person would type it, and its JSON."""
    arguments = ["generate", "-p", PROMPT, "-n", str(TOKENS), *shlex.split(options), "--json"]
    fate = Path(sys.executable).parent / "fate"
    done = subprocess.run([str(fate), *arguments], capture_output=True, text=True, check=True)
    return f"fate {shlex.join(arguments)}", json.loads(done.stdout)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def budget_table(rounds: int) -> tuple[str, dict[str, Any]]:
    """Return the table of budgets and the per-layer rows of the fate run at 50 %."""
    lines = [
        "| experts in memory | setting | hits | late | misses | hit rate % | decode hit rate % | "
        "coverage % | accuracy % | MiB demanded | MiB guessed | MiB wasted | stall s | "
        "decode tok/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    commands, kept = [], {}
    for share in SHARES:
        speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        last: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):  # interleaved, so that a noisy minute hits every setting
            for name, options in SETTINGS.items():
                command, last[name] = run(f"{options} --experts {share}")
                speeds[name].append(last[name]["decode_tok_s"])
                if command not in commands:
                    commands.append(command)
        for name, data in last.items():
            sets = data["experts_capacity"] / data["working_set"]
            lines.append(
                f"| {share} = {data['experts_capacity']}, {sets:.1f} working sets | {name} | "
                f"{data['hits']} | {data['late']} | {data['misses']} | "
                f"{percent(data['hit_rate'])} | {percent(data['phases']['decode']['hit_rate'])} | "
                f"{percent(data['coverage'])} | {percent(data['accuracy'])} | "
                f"{data['bytes_demand'] / MIB:.1f} | {data['bytes_speculated'] / MIB:.1f} | "
                f"{data['bytes_wasted'] / MIB:.1f} | {data['stall_s']:.2f} | "
                f"{statistics.median(speeds[name]):.1f} |"
            )
            if (share, name) == ("50%", PAPER):
                kept = data
            print(lines[-1], flush=True)
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, {processor()}; "
        f"{kept['new_tokens']} tokens after a prompt of "
        f"{kept['prompt_tokens']}; speed is the median of {rounds} interleaved runs.\n"
        f"mode of the rows `{PAPER}`: {kept['mode']}.\n"
    )
    listed = "\n".join(commands)
    return f"{head}\n" + "\n".join(lines) + f"\n\n```\n{listed}\n```\n", kept


def layer_table(data: dict[str, Any]) -> str:
    """Return recall per layer at the router's width and at the extended width."""
    _, wide = run(f"{SETTINGS[PAPER]} --experts 50% --percentile 50")
    lines = [
        "| MoE layer | capacity | recall % at top-k | at the 75th percentile | at the 50th | "
        "hit rate % |",
        "|---|---|---|---|---|---|",
    ]
    for row, wider in zip(data["per_layer"], wide["per_layer"], strict=True):
        lines.append(
            f"| {row['layer']} | {row['capacity']} | {percent(row['recall_top_k'])} | "
            f"{percent(row['recall'])} | {percent(wider['recall'])} | {percent(row['hit_rate'])} |"
        )
    lines.append(
        f"| all | {data['experts_capacity']} | {percent(data['recall_top_k'])} | "
        f"{percent(data['recall'])} | {percent(wide['recall'])} | {percent(data['hit_rate'])} |"
    )
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name the processor as /proc/cpuinfo does, with its cores."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"model name\s*:\s*(.+)", text)
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between a pair of markers."""
    start, end = f"<!-- measure:{name} -->", f"<!-- /measure:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"the document lacks {start} ... {end}; add both lines where it belongs")
    return f"{before}{start}\n{content}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    budgets, kept = budget_table(options.rounds)
    text = options.out.read_text(encoding="utf-8")
    text = fill(text, "budgets", budgets)
    text = fill(text, "layers", layer_table(kept))
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
