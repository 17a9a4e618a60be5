"""`fate calibrate`: fit maps that tell a model's routers ahead of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.generate import open_engine
from fate_moe.cli.terminal import TerminalProgress, emit_json, guarded, show_report, show_table
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.engine.calibrate import LayerFit

_PIECE_TOKENS = 512  # taken of one place of a long text

TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE",
        help="UTF-8 text like what you will ask and read, some hundred kilobytes; also .xz.",
    ),
]  # fmt: skip
JudgeFile = Annotated[
    Path | None,
    typer.Option(
        "--judge", metavar="FILE",
        help="Another text to judge with. Default: every fifth piece of the first is kept for it.",
    ),
]  # fmt: skip
Tokens = Annotated[
    int,
    typer.Option(metavar="N", min=2048, max=1 << 24, help="Most tokens of it, from all over it."),
]


_IN_PLACE = ", in place of the maps it had (fate convert MODEL --force makes them anew)"


@app.command("calibrate")
@guarded
def calibrate(
    model: options.Model = "smolmoe",
    text: TextFile = None,
    judge: JudgeFile = None,
    tokens: Tokens = 16384,
    ram: options.Ram = None,
    experts: options.Experts = None,
    compute: options.Compute = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Learn from a text to guess a model's experts better; once per model.

    Writes small linear maps into the model's store, for `--predictor ridge`. Only guesses
    change, never an answer. The table shows recall on text that was not learned from.

    Examples:

        fate calibrate --text notes.txt

        fate calibrate Qwen/Qwen1.5-MoE-A2.7B-Chat --text corpus.txt.xz --ram 6GiB
    """
    if text is None:
        raise ConfigError("text: none given; try fate calibrate --text FILE")
    words = _read(text)
    judging = None if judge is None else _read(judge)
    engine, tokenizer = open_engine(
        model, revision, cache_dir,
        policy="demand", ram=ram, experts=experts, compute=compute, dtype=dtype, threads=threads,
    )  # fmt: skip
    try:
        with TerminalProgress() as progress:
            from fate_moe.engine import calibrate as fitting

            progress("reading the text", 0, 1)
            ids = spread(_tokenize(tokenizer, words), tokens)
            judge_ids = None if judging is None else spread(_tokenize(tokenizer, judging), tokens)
            progress("reading the text", 1, 1)
            rows = fitting.calibrate(engine, ids, progress, judge_ids)
        store = engine.blueprint.store
        had_maps = engine.blueprint.manifest.fitted is not None
    finally:
        engine.close()
    if json_out:
        emit_json({"store": str(store), "layers": [asdict(row) for row in rows]})
        return
    show_table(("layer", "guesses", "paper", "early", "late"), [_cells(row) for row in rows])
    show_report([*_means(rows), ("written", f"{store}{_IN_PLACE if had_maps else ''}")])


def _read(path: Path) -> str:
    from fate_moe.bench.sets import read_text

    return read_text(path)


def spread(ids: Tensor, tokens: int) -> Tensor:
    """Return at most `tokens` tokens of a text: all, or whole pieces evenly spread over it."""
    import torch

    if len(ids) <= tokens:
        return ids
    pieces, count = len(ids) // _PIECE_TOKENS, tokens // _PIECE_TOKENS
    places = [place * pieces // count * _PIECE_TOKENS for place in range(count)]
    return torch.cat([ids[place : place + _PIECE_TOKENS] for place in places])


def _tokenize(tokenizer: Any, words: str) -> Any:
    import torch

    from fate_moe.models.load import quiet_transformers

    with quiet_transformers():
        return torch.tensor(tokenizer(words)["input_ids"])


def _cells(row: LayerFit) -> list[str]:
    return [str(row.layer), str(row.width), *map(_percent, (row.paper, row.early, row.late))]


def _means(rows: list[LayerFit]) -> list[tuple[str, str]]:
    found = []
    for name in ("paper", "early", "late"):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            mean = _percent(sum(values) / len(values))
            found.append((f"recall, {name}", f"{mean} on {len(values)} layers"))
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
