"""How does a comparison look: a Markdown table to paste, a plot to look at?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fate_moe.bench.compare import ORIGINAL, setting_of
from fate_moe.bench.evaluate import Evaluation
from fate_moe.errors import ConfigError, reason

Evaluations = Mapping[str, Evaluation]
Value = Callable[[Evaluation], float | None]

PERPLEXITY, CHANGE, KL = "perplexity", "perplexity change %", "KL (nats)"


def markdown(found: Evaluations) -> str:
    """Write the table as Markdown."""
    head, cells = table(found)
    lines = [[title.replace("|", "\\|") for title in head], *cells]
    head_line, *rest = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([head_line, "|---" * len(head) + "|\n", *rest])


def table(found: Evaluations) -> tuple[list[str], list[list[str]]]:
    """Return a head and the measures of evaluations, one setting a line."""
    columns = _columns(found)
    lines = [
        [name, *(_text(value(one), title) for title, value in columns), setting_of(name).says]
        for name, one in found.items()
    ]
    return ["setting", *(title for title, _ in columns), "what it is"], lines


def _columns(found: Evaluations) -> list[tuple[str, Value]]:
    """Return titles and where their values come from; None stands for nothing to show."""
    first = next(iter(found.values()))
    columns: list[tuple[str, Value]] = []
    if first.perplexity is not None:
        columns += [(PERPLEXITY, lambda one: one.perplexity), (CHANGE, _change(found))]
    if any(one.kl is not None for one in found.values()):
        columns += [(KL, lambda one: one.kl), ("same top token %", lambda one: one.top1_agreement)]
    columns += [(f"{name} %", _right(name)) for name in first.right]
    if first.valid_json is not None:
        columns.append(("valid JSON %", lambda one: one.valid_json))
    return columns


def _right(name: str) -> Value:
    return lambda one: one.right[name]


def _change(found: Evaluations) -> Value:
    reference = found.get(ORIGINAL)

    def change(one: Evaluation) -> float | None:
        if reference is None or reference is one:
            return None
        return (one.perplexity or 0.0) / (reference.perplexity or 1.0) - 1

    return change


def _text(value: float | None, title: str) -> str:
    if value is None:
        return "-"
    if title == PERPLEXITY:
        return f"{value:.2f}"
    if title == KL:
        return f"{value:.4f}"
    return f"{100 * value:+.2f}" if title == CHANGE else f"{100 * value:.1f}"


def plot(found: Evaluations, path: Path, title: str) -> None:
    """Draw the same figures as bars, one panel a measure; the file's suffix gives the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = [one for one in _columns(found) if one[0] != PERPLEXITY]
    figure = Figure(figsize=(3.1 * len(panels) + 1, 0.45 * len(found) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(found)
    for axis, (column, value) in zip(axes, panels, strict=True):
        texts = [_text(value(one), column) for one in found.values()]
        values = [0.0 if text == "-" else float(text) for text in texts]
        colours = ["#9aa5b1" if name == ORIGINAL else "#2f6db5" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.margins(x=0.22)
        axis.set_title(column.replace("$", r"\$"), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)  # no mathematics in names
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {reason(error)}") from error
