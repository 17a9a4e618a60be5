"""`fate bench`: how fast is Fate on this machine, beside others?"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from fate_moe.cli.app import app
from fate_moe.cli.terminal import (
    TerminalProgress,
    default_cache_dir,
    emit_json,
    guarded,
    show_report,
    show_table,
    stdout,
    tell,
)
from fate_moe.config import parse_size
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from fate_moe.bench.cgroup import DiskRate
    from fate_moe.bench.rivals.rival import Rival
    from fate_moe.bench.rounds import Bench, Form, Row

bench_app = typer.Typer(help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")

WHAT, WHO = "What to measure", "Whom to measure"

Shape = Annotated[
    str,
    typer.Argument(
        metavar="SHAPE",
        help="Sizes of the model, whose weights are random: qwen1.5-moe-a2.7b (8 GB on disk for "
        "Fate, 8 GB more for others), qwen3-30b-a3b, olmoe-1b-7b, gpt-oss-20b, or tiny.",
    ),
]
LlamaBench = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", rich_help_panel=WHO,
        help="The llama-bench of llama.cpp, built for this machine.",
    ),
]  # fmt: skip
IkLlamaBench = Annotated[
    Path | None,
    typer.Option(metavar="PATH", rich_help_panel=WHO, help="The llama-bench of ik_llama.cpp."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--transformers-checkpoint", metavar="DIR", rich_help_panel=WHO,
        help="A checkpoint of the same sizes, for transformers with accelerate's disk offload, in "
        "the checkpoint's own dtype.",
    ),
]  # fmt: skip
Full = Annotated[
    bool,
    typer.Option(
        "--full/--short", rich_help_panel=WHAT,
        help="Full: no limit, 6, 4 and 3 GiB, 64 tokens, every known setting, 3 rounds. Short: no "
        "limit and 4 GiB, 32 tokens, one round; under 10 minutes once the models are made.",
    ),
]  # fmt: skip
LimitList = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", rich_help_panel=WHAT,
        help="Memory of each whole process, such as none,6GiB,4GiB. A limit needs root and Linux.",
    ),
]  # fmt: skip
Rounds = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1000, rich_help_panel=WHAT, help="Runs of everything."),
]
Prompt = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, max=32768, rich_help_panel=WHAT,
                 help="Tokens to read. Default: 512."),
]  # fmt: skip
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, max=4096, rich_help_panel=WHAT, help="Tokens to write."),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", min=1, rich_help_panel=WHAT,
        help="For each run; what takes longer did not finish. Default: 300.",
    ),
]  # fmt: skip
Readahead = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", rich_help_panel=WHAT,
        help="Readahead of the disk in KiB to try under a limit for programs that map files, such "
        "as 128,8192; put back afterwards. Needs root. Default: the machine's own.",
    ),
]  # fmt: skip
DiskLimit = Annotated[
    str | None,
    typer.Option(
        "--disk", metavar="SIZE", rich_help_panel=WHAT,
        help="Bytes per second that the models' disk gives to each program, such as 1.2GB: a slow "
        "disk on a fast machine. Needs root and Linux. Default: the disk as it is.",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1024, rich_help_panel=WHAT,
                 help="Computing threads of every program. Default: one per core."),
]  # fmt: skip
ResidentBits = Annotated[
    int,
    typer.Option(metavar="N", rich_help_panel=WHAT,
                 help="Of Fate's weights that are no routed experts: 16, 8 or 4."),
]  # fmt: skip
Models = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the made-up models are kept. Default: bench in the cache folder.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Receives rows.jsonl (a line for each run), card.json, table.md and plot.png.",
    ),
]
JsonOut = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


@bench_app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    """Measure speed on this machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench_app.command("rivals")
@guarded
def rivals(
    shape: Shape = "qwen1.5-moe-a2.7b",
    llama_bench: LlamaBench = None,
    ik_llama_bench: IkLlamaBench = None,
    transformers_checkpoint: Checkpoint = None,
    full: Full = False,
    limits: LimitList = None,
    rounds: Rounds = None,
    prompt: Prompt = None,
    tokens: Tokens = None,
    time_limit: TimeLimit = None,
    readahead: Readahead = None,
    disk: DiskLimit = None,
    threads: Threads = None,
    resident_bits: ResidentBits = 4,
    models: Models = None,
    out: Out = Path("fate-bench"),
    json_out: JsonOut = False,
) -> None:
    """Measure Fate and programs like it on the same weights, in turns, under the same limits.

    The model is made up once, in about a minute: a store for Fate, a GGUF for the others. Each run
    is a process of its own; every program reads and writes random tokens. What is measured depends
    on what else the machine does: leave it alone meanwhile.

    Examples:

        fate bench rivals --llama-bench llama.cpp/build/bin/llama-bench

        fate bench rivals --full --llama-bench ./llama-bench --readahead 128,8192

        fate bench rivals olmoe-1b-7b --limits none,2GiB --rounds 5 --out olmoe

        fate bench rivals --limits 4GiB --disk 500MB
    """
    if resident_bits not in (4, 8, 16):
        raise ConfigError(f"resident-bits: {resident_bits} is none of 4, 8, 16")
    form = _form(full, limits, rounds, prompt, tokens, time_limit)
    named = {
        "llama.cpp": llama_bench, "ik_llama.cpp": ik_llama_bench,
        "transformers": transformers_checkpoint,
    }  # fmt: skip
    with TerminalProgress() as progress:
        from fate_moe.bench import rounds as running
        from fate_moe.bench.process import ending_tidily
        from fate_moe.bench.readahead import parse_kib

        kib = () if readahead is None else tuple(parse_kib(readahead))
        _check_limits(form)
        root = models or default_cache_dir() / "bench"
        rate = None if disk is None else _disk_rate(root, _limit(disk, "disk"))
        bench = _prepare(shape, root, named, resident_bits, threads, rate, progress)
        if kib and bench.disk is None:
            tell("readahead stays as it is: it cannot be set here (needs root)")
        form = replace(form, readahead_kib=kib if bench.disk else ())
        with open_out(out) as lines, ending_tidily():
            (out / "card.json").write_text(json.dumps(asdict(bench.card), indent=1) + "\n")
            found = running.run_rounds(bench, form, lines, _tell_row, progress)
    _show(found, bench, out, f"{shape}: tokens per second", json_out)


def _form(
    full: bool,
    limits: str | None,
    rounds: int | None,
    prompt: int | None,
    tokens: int | None,
    time_limit: float | None,
) -> Form:
    from fate_moe.bench.rounds import Form

    gib = 2**30
    sizes: tuple[int | None, ...] = (None, 6 * gib, 4 * gib, 3 * gib) if full else (None, 4 * gib)
    if limits is not None:
        sizes = tuple(_limit(part, "limits") for part in limits.split(","))
        if len(set(sizes)) != len(sizes):
            raise ConfigError(f"limits: {limits!r:.80} names one twice")
    return Form(
        limits=sizes,
        rounds=rounds or (3 if full else 1),
        prompt_tokens=prompt or 512,
        new_tokens=tokens or (64 if full else 32),
        seconds=time_limit or 300.0,
        thorough=full,
    )


def _limit(text: str, what: str) -> int | None:
    if text.strip() == "none":
        return None
    size = parse_size(text.strip().removesuffix("/s"), what)
    if size.count_bytes is None or size.count_bytes < 2**20:
        raise ConfigError(f"{what}: {text!r:.40}: need none or a size from 1MiB, such as 4GiB")
    return size.count_bytes


def _check_limits(form: Form) -> None:
    from fate_moe.bench.cgroup import unavailable

    if any(limit is not None for limit in form.limits) and (reason := unavailable()):
        raise ConfigError(f"{reason} (--limits none)")


def _prepare(
    shape: str,
    root: Path,
    named: dict[str, Path | None],
    resident_bits: int,
    threads: int | None,
    rate: DiskRate | None,
    progress: TerminalProgress,
) -> Bench:
    """Check every program, make the models, measure the machine."""
    from fate_moe.bench.ceilings import token_bytes
    from fate_moe.bench.machine import draw_card, draw_limited_card, usable_cores
    from fate_moe.bench.readahead import disk_of, why_fixed
    from fate_moe.bench.rivals.table import RIVALS, open_rivals
    from fate_moe.bench.rounds import Bench
    from fate_moe.bench.shapes import find_shape
    from fate_moe.bench.synthetic import write_store
    from fate_moe.bench.synthetic_gguf import write_gguf

    sizes = find_shape(shape)
    store, gguf = root / shape / f"store-resident{resident_bits}", root / shape / "model.gguf"
    running: list[Rival] = open_rivals(store, gguf, named)
    manifest = write_store(sizes, store, resident_bits=resident_bits, progress=progress)
    if any(path is not None and RIVALS[name].reads_gguf for name, path in named.items()):
        write_gguf(sizes, gguf, progress=progress)
    disk = disk_of(store)
    files = running[0].files
    card = draw_limited_card(files, rate, progress) if rate else draw_card(files, progress)
    return Bench(
        rivals=running,
        card=card,
        disk=None if why_fixed(disk) else disk,
        read_bytes=token_bytes(store, manifest, int(sizes.config().num_experts_per_tok)),
        threads=threads or usable_cores(),
        rate=rate,
    )


def _disk_rate(root: Path, bytes_s: int | None) -> DiskRate | None:
    """Name the disk of a folder, which may be still to be made, and what it is held to."""
    from fate_moe.bench.cgroup import DiskRate, unavailable
    from fate_moe.bench.readahead import device_of, disk_of

    if bytes_s is None:
        return None
    disk = disk_of(next(path for path in (root, *root.absolute().parents) if path.exists()))
    if disk is None:
        raise ConfigError("disk: the models lie on no disk that could be limited; leave it out")
    rate = DiskRate(device_of(disk), bytes_s)
    if reason := unavailable(None, rate):
        raise ConfigError(reason)
    return rate


def open_out(out: Path) -> IO[str]:
    """Make a folder for results and open its rows.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        return (out / "rows.jsonl").open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {out}: cannot be written: {error.strerror or error}") from error


def left_out_rows(names: list[str]) -> list[tuple[str, str]]:
    """Say in a report which columns the terminal had no room for."""
    if not names:
        return []
    return [("left out", f"{', '.join(names)}: the terminal is too narrow; table.md has them")]


def _tell_row(row: Row) -> None:
    from fate_moe.bench.standings import limit_text

    what = row.state if row.tok_s is None else f"{row.tok_s:.2f} tok/s"
    share = "" if row.share is None else f", {100 * row.share:.0f} % of the ceiling"
    why = f" ({row.why})" if row.why else ""
    ahead = "" if row.readahead_kib is None else f", readahead {row.readahead_kib} KiB"
    tell(
        f"round {row.round}, {limit_text(row.limit_bytes)}, {row.stage}: {row.rival} "
        f"({row.setting}{ahead}): {what}{share}{why}, {row.wall_s:.0f} s"
    )


def _show(rows: list[Row], bench: Bench, out: Path, title: str, json_out: bool) -> None:
    from fate_moe.bench import standings

    found = standings.standings(rows)
    table = standings.markdown(found, bench.card, title)
    try:
        (out / "table.md").write_text(table, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    standings.plot(found, out / "plot.png", title)
    if json_out:
        emit_json({"card": asdict(bench.card), "standings": [asdict(one) for one in found],
                   "out": str(out)})  # fmt: skip
        return
    if stdout.is_terminal:
        for line in standings.card_lines(bench.card):
            tell(line.removeprefix("- "), "- ", console=stdout)
    left_out = show_table(*standings.table(found), least=standings.LEAST, plain=table)
    names = ("rows.jsonl", "card.json", "table.md", "plot.png")
    written = [("written", " ".join(os.fspath(out / name) for name in names))]
    show_report([*left_out_rows(left_out), *written])
