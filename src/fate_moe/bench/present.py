"""How does a comparison look: a Markdown table to paste, a plot to look at?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fate_moe.bench.compare import ORIGINAL, SETTINGS
from fate_moe.bench.evaluate import Evaluation
from fate_moe.errors import ConfigError

Evaluations = Mapping[str, Evaluation]


def markdown(found: Evaluations) -> str:
    """Write evaluations as a Markdown table, one setting a row."""
    columns = _columns(found)
    lines = ["| setting | " + " | ".join(columns) + " | what it is |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, one in found.items():
        cells = [_cell(column, one, found) for column in columns]
        says = SETTINGS[name].says if name in SETTINGS else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {says} |")
    return "\n".join(lines) + "\n"


def _columns(found: Evaluations) -> list[str]:
    first = next(iter(found.values()))
    columns = []
    if first.perplexity is not None:
        columns += ["perplexity", "change %"]
    if any(one.kl is not None for one in found.values()):
        columns += ["KL (nats)", "same top token %"]
    columns += [f"{name} %" for name in first.right]
    if first.valid_json is not None:
        columns.append("valid JSON %")
    return columns


def _cell(column: str, one: Evaluation, found: Evaluations) -> str:
    if column == "perplexity":
        return f"{one.perplexity:.2f}"
    if column == "change %":
        reference = found.get(ORIGINAL)
        if reference is None or reference is one or not reference.perplexity:
            return "-"
        return f"{100 * ((one.perplexity or 0) / reference.perplexity - 1):+.2f}"
    if column == "KL (nats)":
        return "-" if one.kl is None else f"{one.kl:.4f}"
    if column == "same top token %":
        return _percent(one.top1_agreement)
    if column == "valid JSON %":
        return _percent(one.valid_json)
    return _percent(one.right[column.removesuffix(" %")])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def plot(found: Evaluations, path: Path, title: str) -> None:
    """Draw the same figures as bars, one panel a measure; the file's suffix gives the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = [column for column in _columns(found) if column != "perplexity" or len(found) == 1]
    figure = Figure(figsize=(3.1 * len(panels) + 1, 0.45 * len(found) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(found)
    for axis, column in zip(axes, panels, strict=True):
        texts = [_cell(column, one, found) for one in found.values()]
        values = [0.0 if text == "-" else float(text) for text in texts]
        colours = ["#9aa5b1" if name == ORIGINAL else "#2f6db5" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.margins(x=0.22)
        axis.set_title("perplexity " + column if column == "change %" else column, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
