"""How does a comparison of policies look: medians, a table, a plot?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

from fate_moe.bench.policies import BOUND, Row
from fate_moe.errors import ConfigError, reason

LEAST = (
    "MiB a prompt token", "late", "prefill tok/s", "recall", "stall", "MiB a token",
    "quartiles", "of the bound", "hit",
)  # fmt: skip
"""Columns that a narrow screen can do without, the first of these first."""

_HEAD = (
    "link", "experts", "policy", "decode tok/s", "prefill tok/s", "hit", "late", "recall",
    "MiB a token", "MiB a prompt token", "stall", "against demand", "quartiles", "of the bound",
)  # fmt: skip
_BOUND_COLOUR = "#222222"
Cell = tuple[float | None, float]  # link, budget


def markdown(rows: Sequence[Row]) -> str:
    """Write the table as Markdown."""
    head, cells = table(rows)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a head and the medians, a policy a line, by link and budget.

    Of speeds in decode the median is over the prompts of all rounds, and so it is of what a prompt
    was to `demand`: its own speed on the same prompt in the same round. Of all else: over rounds.
    """
    lines = []
    for link, budget in _cells(rows):
        own = {name: [r for r in rows if _is(r, name, link, budget)] for name in _policies(rows)}
        bound = _median(own.get(BOUND, ()), lambda row: row.decode_tok_s)
        for name, ones in own.items():
            if ones:
                lines.append(_line(name, ones, ratios(ones, own.get("demand", ())), bound))
    return _HEAD, lines


def ratios(ones: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """Return how much faster a policy decoded each prompt than another one did in the same round.

    Args:
        ones, others: the rows of two policies in one cell; without a common round there is none.
    """
    rates = {row.round: _each(row) for row in others}
    return [
        rate / other
        for row in ones
        if row.round in rates
        for rate, other in zip(_each(row), rates[row.round], strict=True)
    ]


def _each(row: Row) -> tuple[float, ...]:
    return row.decode_each or (row.decode_tok_s,)


def _rate(ones: Sequence[Row]) -> float:
    return median(rate for row in ones for rate in _each(row))


def _line(
    name: str, ones: Sequence[Row], against: Sequence[float], bound: float | None
) -> tuple[str, ...]:
    rate = _rate(ones)
    prefill = _median(ones, lambda row: row.prefill_tok_s)
    prompt = _median(ones, lambda row: row.bytes_prompt)
    low, _, high = quantiles(against, method="inclusive") if len(against) > 1 else (0.0, 0.0, 0.0)
    return (
        link_text(ones[0].link_bytes_s),
        f"{100 * ones[0].budget:g} %",
        name,
        f"{rate:.2f}",
        "-" if prefill is None else f"{prefill:.1f}",
        *(
            _percent(_median(ones, one))
            for one in (
                lambda row: row.hit_rate,
                lambda row: row.late_rate,
                lambda row: row.recall,
            )
        ),
        f"{median(row.bytes_token for row in ones) / 2**20:.2f}",
        "-" if prompt is None else f"{prompt / 2**20:.2f}",
        _percent(_median(ones, lambda row: row.stall_share)),
        f"{median(against):.2f}x" if against else "-",
        f"{low:.2f} to {high:.2f}" if len(against) > 1 else "-",
        "-" if not bound else f"{100 * rate / bound:.0f} %",
    )


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw decode speed against budget, one panel a link; the file's suffix gives the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    links = list(dict.fromkeys(link for link, _ in _cells(rows)))
    figure = Figure(figsize=(4.4 * len(links) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(links), squeeze=False)[0]
    for axis, link in zip(panels, links, strict=True):
        for name in _policies(rows):
            budgets = [b for one, b in _cells(rows) if one == link]
            found = [(b, [r for r in rows if _is(r, name, link, b)]) for b in budgets]
            at = [(100 * b, _rate(ones)) for b, ones in found if ones]
            if at:
                style = {"color": _BOUND_COLOUR, "linestyle": "--"} if name == BOUND else {}
                axis.plot(*zip(*at, strict=True), marker="o", markersize=3.5, label=name, **style)
        axis.set_title(f"link {link_text(link)}", fontsize=9)
        axis.set_xlabel("experts with a slot, %", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    panels[0].set_ylabel("decode, tokens per second", fontsize=9)
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # no mathematics in names
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error


def link_text(bytes_s: float | None) -> str:
    """Name a link."""
    return "as it is" if bytes_s is None else f"{bytes_s / 1e9:g} GB/s"


def _policies(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.policy for row in rows))


def _cells(rows: Sequence[Row]) -> list[Cell]:
    """List the links and budgets that were measured, in order."""
    found = dict.fromkeys((r.link_bytes_s, r.budget) for r in rows if r.policy != BOUND)
    links = list(dict.fromkeys(link for link, _ in found))
    return sorted(found, key=lambda cell: (links.index(cell[0]), cell[1]))


def _is(row: Row, name: str, link: float | None, budget: float) -> bool:
    return (row.policy, row.link_bytes_s, row.budget) == (name, link, budget)


def _median(ones: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    known = [found for row in ones if (found := value(row)) is not None]
    return median(known) if known else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
