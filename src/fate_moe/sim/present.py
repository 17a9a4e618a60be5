"""How do replays look: a table, a file for a spreadsheet, a plot?"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fate_moe.errors import ConfigError, reason
from fate_moe.sim.sweep import BELADY, Row

_BOUND = "#222222"


def name_of(row: Row) -> str:
    """Name what a row is about besides its trace and capacity."""
    guessed = "" if row.predictor == "none" else f" + {row.predictor}"
    return f"{row.cache}, {row.allocation}{guessed}"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return a head and the cells of one line per row."""
    head = [
        "model", "capacity", "cache", "allocation", "predictor", "requests", "hit rate", "misses",
        "gap closed", "recall",
    ]  # fmt: skip
    cells = [_cells(row, _gap_closed(row, rows)) for row in rows]
    if any(row.decode_tok_s is not None for row in rows):
        head += ["late", "decode tok/s", "stall"]
        for row, line in zip(rows, cells, strict=True):
            line += [str(row.late), f"{row.decode_tok_s or 0:.2f}", _percent(row.stall_share)]
    return head, cells


def _cells(row: Row, closed: float | None) -> list[str]:
    return [
        row.model,
        f"{100 * row.capacity:g} %",
        row.cache,
        row.allocation,
        row.predictor,
        str(row.requests),
        f"{100 * row.hit_rate:.2f} %",
        str(row.misses),
        "-" if closed is None else f"{closed:+.2f}",
        _percent(row.recall),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _gap_closed(row: Row, rows: Sequence[Row]) -> float | None:
    """Return how far a row is from LRU (0) to Belady (1), where both were replayed beside it."""

    def beside(cache: str) -> float | None:
        like = ("model", "allocation", "predictor", "capacity")
        return next(
            (
                other.hit_rate
                for other in rows
                if other.cache == cache
                and all(getattr(other, name) == getattr(row, name) for name in like)
            ),
            None,
        )

    low, high = beside("lru"), beside(BELADY)
    if low is None or high is None or high <= low:
        return None
    return (row.hit_rate - low) / (high - low)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every field of every row.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw hit rate, and with a link speed, against capacity, one column a model.

    Args:
        path: of the picture; its suffix gives the format.
    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in rows))
    kinds: list[tuple[str, Callable[[Row], float]]] = [
        ("hit rate, %", lambda row: 100 * row.hit_rate)
    ]
    if any(row.decode_tok_s is not None for row in rows):
        kinds.append(("decode, predicted tokens per second", lambda row: row.decode_tok_s or 0.0))
    size = (4.6 * len(models) + 0.6, 4.0 * len(kinds) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(kinds), len(models), squeeze=False, sharey="row")
    for line, (what, value) in zip(panels, kinds, strict=True):
        for axis, model in zip(line, models, strict=True):
            _draw(axis, [row for row in rows if row.model == model], value)
            axis.set_title(model.replace("$", r"\$"), fontsize=9)  # no mathematics in names
        line[0].set_ylabel(what, fontsize=9)
    lines, names = panels[0][-1].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside lower center", ncols=2 * len(models) - 1, fontsize=8,
        frameon=False,
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error


def _draw(axis: Any, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    names = sorted({name_of(row) for row in rows}, key=lambda name: not name.startswith(BELADY))
    for name in names:
        own = sorted((r for r in rows if name_of(r) == name), key=lambda row: row.capacity)
        at = [100 * row.capacity for row in own], [value(row) for row in own]
        style = {"color": _BOUND, "linestyle": "--"} if name.startswith(BELADY) else {}
        axis.plot(*at, marker="o", markersize=3.5, linewidth=1.4, label=name, **style)
    axis.set_xlabel("experts with a slot, %", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
