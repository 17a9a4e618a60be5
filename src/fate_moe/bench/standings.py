"""Who was how fast: the medians of all rounds, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fate_moe.bench.machine import Card
from fate_moe.bench.rivals.rival import STAGES, Stage
from fate_moe.bench.rounds import OK, Row
from fate_moe.config import format_bytes
from fate_moe.errors import ConfigError, reason

OWN = "fate"
LEAST = ("range", "runs", "of the ceiling")
"""Columns that a narrow screen can do without, the first of these first."""

_HEAD = (
    "memory", "stage", "program", "setting", "tok/s", "range", "runs", "of the ceiling", "Fate is",
)  # fmt: skip
_COLOURS = {OWN: "#2f6db5"}
_OTHERS = ("#9aa5b1", "#c3a76b", "#8fb39a")


@dataclass(frozen=True, slots=True)
class Standing:
    """All rounds of one rival with one setting in one cell.

    Attributes:
        setting: with the readahead that was set for it.
        state: of the last run.
        tok_s, low, high: median and range of the runs that ended well; None without one.
        share: median share of the ceiling; None where unknown.
        runs: how many ended well.
    """

    limit_bytes: int | None
    stage: Stage
    rival: str
    setting: str
    state: str
    tok_s: float | None
    low: float | None
    high: float | None
    share: float | None
    runs: int


def standings(rows: Sequence[Row]) -> list[Standing]:
    """Sum up rows, in the order of their first runs."""
    groups: dict[tuple[int | None, Stage, str, str], list[Row]] = {}
    for row in rows:
        ahead = "" if row.readahead_kib is None else f", readahead {row.readahead_kib} KiB"
        key = (row.limit_bytes, row.stage, row.rival, row.setting + ahead)
        groups.setdefault(key, []).append(row)
    return [_standing(key, group) for key, group in groups.items()]


def _standing(key: tuple[int | None, Stage, str, str], rows: list[Row]) -> Standing:
    rates = [row.tok_s for row in rows if row.state == OK and row.tok_s is not None]
    shares = [row.share for row in rows if row.share is not None]
    limit, stage, rival, setting = key
    return Standing(
        limit_bytes=limit,
        stage=stage,
        rival=rival,
        setting=setting,
        state=rows[-1].state,
        tok_s=statistics.median(rates) if rates else None,
        low=min(rates, default=None),
        high=max(rates, default=None),
        share=statistics.median(shares) if shares else None,
        runs=len(rates),
    )


def best(found: Sequence[Standing]) -> list[Standing]:
    """Keep the fastest setting of each rival in each cell."""
    kept: dict[tuple[int | None, Stage, str], Standing] = {}
    for one in found:
        key = (one.limit_bytes, one.stage, one.rival)
        if key not in kept or (one.tok_s or 0.0) > (kept[key].tok_s or 0.0):
            kept[key] = one
    return list(kept.values())


def markdown(found: Sequence[Standing], card: Card, title: str) -> str:
    """Write the card and the table."""
    head, cells = table(found)
    lines = [f"# {title}", "", *card_lines(card), "", f"| {' | '.join(head)} |"]
    lines.append("|---" * len(head) + "|")
    lines += [f"| {' | '.join(map(_escaped, line))} |" for line in cells]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def table(found: Sequence[Standing]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a head and a line for each standing."""
    own = {(one.limit_bytes, one.stage): one.tok_s for one in found if one.rival == OWN}
    return _HEAD, [_cells(one, own.get((one.limit_bytes, one.stage))) for one in found]


def card_lines(card: Card) -> list[str]:
    """Write the machine card as a Markdown list."""
    memory = ", ".join(
        f"{rate / 1e9:.1f} GB/s on {threads} thread{'s' * (threads > 1)}"
        for threads, rate in card.memory_bytes_s.items()
    )
    disk = ", ".join(f"{rate / 1e9:.2f} GB/s at {name}" for name, rate in card.disk_bytes_s.items())
    both = (
        ""
        if card.both_bytes_s is None
        else (
            ", and while all cores read memory at {:.1f} GB/s {:.2f} GB/s".format(
                *(rate / 1e9 for rate in card.both_bytes_s)
            )
        )
    )
    held = (
        ""
        if card.disk_limit_bytes_s is None
        else f" (held to {card.disk_limit_bytes_s / 1e9:.2f} GB/s for every program)"
    )
    ahead = "unknown" if card.readahead_kib is None else f"{card.readahead_kib} KiB"
    return [
        f"- processor: {card.cpu}, {card.cores} cores, {' '.join(card.isa) or 'no known SIMD'}",
        f"- memory: {format_bytes(card.ram_bytes)}, reads {memory}",
        f"- disk: {card.disk or 'none'}{held}, O_DIRECT reads {disk or 'not measured'}{both}; "
        f"readahead {ahead}",
        f"- system: {card.kernel}, load average before: {card.load_average}",
    ]


def _cells(one: Standing, own: float | None) -> tuple[str, ...]:
    rate, spread = one.state, "-"
    if one.tok_s is not None:
        rate, spread = f"{one.tok_s:.2f}", f"{one.low:.2f} to {one.high:.2f}"
    ahead = "-"
    if one.rival != OWN and own and one.tok_s:
        ahead = f"{own / one.tok_s:.2f}x"
    share = "-" if one.share is None else f"{100 * one.share:.0f} %"
    memory = limit_text(one.limit_bytes)
    return (memory, one.stage, one.rival, one.setting, rate, spread, str(one.runs), share, ahead)


def limit_text(limit_bytes: int | None) -> str:
    return "no limit" if limit_bytes is None else format_bytes(limit_bytes)


def plot(found: Sequence[Standing], path: Path, title: str) -> None:
    """Draw the best settings as bars, one panel a stage; the file's suffix gives the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = best(found)
    rivals = list(dict.fromkeys(one.rival for one in shown))
    limits = list(dict.fromkeys(one.limit_bytes for one in shown))
    others = [name for name in rivals if name != OWN]
    colours = _COLOURS | dict(zip(others, _OTHERS, strict=False))
    figure = Figure(figsize=(9, 0.5 * len(limits) * len(rivals) + 1.8), layout="constrained")
    panels = figure.subplots(1, len(STAGES), squeeze=False)[0]
    height = 0.8 / len(rivals)
    for axis, stage in zip(panels, STAGES, strict=True):
        cells = {(one.limit_bytes, one.rival): one for one in shown if one.stage == stage}
        for place, name in enumerate(rivals):
            ones = [cells.get((limit, name)) for limit in limits]
            rates = [(one.tok_s or 0.0) if one else 0.0 for one in ones]
            texts = ["-" if one is None else _cells(one, None)[4] for one in ones]
            at = [row + (place - (len(rivals) - 1) / 2) * height for row in range(len(limits))]
            bars = axis.barh(at, rates, height, color=colours.get(name, _OTHERS[0]), label=name)
            axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set_yticks(range(len(limits)), [limit_text(limit) for limit in limits])
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_title(f"{stage}, tokens per second", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # no mathematics in names
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error
