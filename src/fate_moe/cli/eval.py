"""`fate eval`: how good is a model, and what does each precision cost?"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.terminal import (
    TerminalProgress,
    default_cache_dir,
    emit_json,
    guarded,
    show_report,
    show_rows,
    show_table,
    stdout,
)
from fate_moe.config import DEFAULT_POLICY
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from fate_moe.bench.compare import Models
    from fate_moe.bench.evaluate import Evaluation, Tasks
    from fate_moe.types import Progress

MEASURES = "What to measure"

Text = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", rich_help_panel=MEASURES,
        help="Perplexity on this text (UTF-8, also .xz). Default: a short text that comes along.",
    ),
]  # fmt: skip
Tokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=MEASURES,
        help="Most tokens of the text, evenly spread. Default: all whole sequences.",
    ),
]  # fmt: skip
Sequence = Annotated[
    int,
    typer.Option(
        metavar="N", rich_help_panel=MEASURES,
        help="The text is cut into independent sequences of this many tokens.",
    ),
]  # fmt: skip
Continuation = Annotated[
    int,
    typer.Option(
        metavar="N", rich_help_panel=MEASURES,
        help="Only the last N tokens of each sequence count, written one by one after the others "
        "were read as a prompt: what a prompt in two bits does to its answer. Default: all count.",
    ),
]  # fmt: skip
QuestionFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--questions", metavar="FILE", rich_help_panel=MEASURES,
        help='One JSON object a line: {"query": .., "choices": [..], "gold": 0} or {"context": .., '
        '"continuation": ..}. May be given several times.',
    ),
]  # fmt: skip
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=MEASURES, help="Most questions of each file. Default: all."
    ),
]
JsonPrompts = Annotated[
    bool,
    typer.Option(
        "--json-prompts", rich_help_panel=MEASURES,
        help="Ask 40 fixed questions that want JSON; count the valid answers of at most 96 tokens.",
    ),
]  # fmt: skip
Against = Annotated[
    str | None,
    typer.Option(
        metavar="STORE", rich_help_panel=MEASURES,
        help="Compare token by token with another store of the model, with a checkpoint "
        "(unquantized), or with `original`: the model's own checkpoint.",
    ),
]  # fmt: skip
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", rich_help_panel=MEASURES,
        help="Settings side by side, against the original: int8, int4, int4-minmax (plain scales), "
        "int2 (the high bits of int4), hybrid (in prefill the least popular experts in int2), "
        "hybrid@10% (up to that share of the tokens); with --continuation also on-miss@17% and "
        "bias@0.01 (--int2-on-miss and --routing-bias). "
        "Stores of 8 and 16 bits are made in the cache folder.",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", rich_help_panel=MEASURES,
        help="Where --compare writes its table (eval.md) and plot (eval.png).",
    ),
]  # fmt: skip


@app.command("eval")
@guarded
def evaluate(
    model: options.Model = "smolmoe",
    text: Text = None,
    tokens: Tokens = None,
    sequence: Sequence = 512,
    continuation: Continuation = 0,
    questions: QuestionFiles = None,
    limit: Limit = None,
    json_prompts: JsonPrompts = False,
    against: Against = None,
    compare: Compare = None,
    out: Out = Path("fate-eval"),
    ram: options.Ram = None,
    vram: options.Vram = None,
    experts: options.Experts = None,
    context: options.Context = None,
    policy: options.Policy = DEFAULT_POLICY,
    compute: options.Compute = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Measure a model's quality, within the same memory limits as any run.

    Without any file: perplexity on a short text that comes along.

    Examples:

        fate eval smolmoe --text notes.txt --experts 50%

        fate eval smolmoe --questions arc_easy.jsonl --questions piqa.jsonl --limit 200

        fate eval smolmoe --compare int8,int4,int2,hybrid --out fate-eval

        fate eval smolmoe --compare int4,hybrid@10%,hybrid@50% --continuation 64 --json-prompts
    """
    if compare is not None and against is not None:
        raise ConfigError("against: --compare has its own reference, the original; leave it out")
    names = None if compare is None else [name.strip() for name in compare.split(",")]
    with TerminalProgress() as progress:
        progress("starting", 0, 1)
        from fate_moe.bench.compare import Models, check_names

        progress("starting", 1, 1)
        if names is not None:
            check_names(names, is_written=bool(continuation) or json_prompts)
            _check_out(out)
        wanted = _tasks(text, tokens, sequence, continuation, questions, limit, json_prompts)
        settings = {
            "ram": ram, "vram": vram, "experts": experts, "context_tokens": context,
            "compute": compute, "dtype": dtype,
            "threads": threads,
        }  # fmt: skip
        models = Models(model, cache_dir or default_cache_dir(), revision, policy, settings)
        if names is None:
            found = _one(models, wanted, against, progress)
        else:
            found = _compare(models, names, wanted, progress)
    if names is None:
        _show(found[""], json_out)
    else:
        _show_comparison(found, out, f"{model}: what each precision costs", json_out)


def _tasks(
    text: Path | None,
    tokens: int | None,
    sequence: int,
    continuation: int,
    questions: list[Path] | None,
    limit: int | None,
    json_prompts: bool,
) -> Tasks:
    from fate_moe.bench.evaluate import Tasks
    from fate_moe.bench.sets import own_json_prompts, own_text, read_questions, read_text

    for name, value, least in (
        ("tokens", tokens, 2),
        ("sequence", sequence, 2),
        ("limit", limit, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: have {value}, need {least} or more")
    if not 0 <= continuation < sequence:
        raise ConfigError(
            f"continuation: have {continuation}, need 0 to {sequence - 1} of a sequence"
        )
    files = questions or []
    names = [path.name.removesuffix(".jsonl") for path in files]
    if len(set(names)) < len(names):
        raise ConfigError("questions: two files have the same name; rename one")
    wants_text = text is not None or not (files or json_prompts)
    return Tasks(
        text=(read_text(text) if text is not None else own_text()) if wants_text else None,
        sequence_tokens=sequence,
        most_tokens=tokens,
        written_tokens=continuation,
        questions={
            name: read_questions(path, limit) for name, path in zip(names, files, strict=True)
        },
        json_prompts=own_json_prompts() if json_prompts else (),
    )


def _one(
    models: Models, wanted: Tasks, against: str | None, progress: Progress
) -> dict[str, Evaluation]:
    from fate_moe.bench.compare import evaluate_one, scratch_folder

    with scratch_folder(models) as folder:
        return {"": evaluate_one(models, wanted, against, folder, progress)}


def _compare(
    models: Models, names: list[str], wanted: Tasks, progress: Progress
) -> dict[str, Evaluation]:
    from fate_moe.bench.compare import compare

    return compare(models, names, wanted, progress)


def _show(found: Evaluation, json_out: bool) -> None:
    measures = _measures(found)
    if json_out:
        emit_json({**measures, **asdict(found.report)})
        return
    show_rows(_rows(found), stdout)
    show_report(found.report.rows())


def _measures(found: Evaluation) -> dict[str, object]:
    measures = asdict(found)
    del measures["report"]
    return measures


def _rows(found: Evaluation) -> list[tuple[str, str]]:
    rows = []
    if found.perplexity is not None:
        rows.append(("perplexity", f"{found.perplexity:.2f} over {found.tokens} tokens"))
    if found.kl is not None and found.top1_agreement is not None:
        rows.append(("against the reference", f"KL {found.kl:.4f} nats a token, the same likeliest "
                     f"token for {100 * found.top1_agreement:.1f}%"))  # fmt: skip
    rows += [
        (name, f"{100 * share:.1f}% of {found.asked[name]} right")
        for name, share in found.right.items()
    ]
    if found.valid_json is not None:
        rows.append(("valid JSON", f"{100 * found.valid_json:.1f}% of the answers"))
    return rows


def _check_out(out: Path) -> None:
    """Find out before the long run whether its result can be written."""
    there = next((folder for folder in (out, *out.absolute().parents) if folder.exists()), out)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"out: {out}: {there} is no folder that can be written")


def _show_comparison(found: dict[str, Evaluation], out: Path, title: str, json_out: bool) -> None:
    from fate_moe.bench import present

    table = present.markdown(found)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.md").write_text(f"# {title}\n\n{table}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    present.plot(found, out / "eval.png", title)
    if json_out:
        emit_json({"settings": {name: {**_measures(one), **asdict(one.report)}
                                for name, one in found.items()}, "out": str(out)})  # fmt: skip
        return
    show_table(*present.table(found), plain=table)
    show_report([("written", f"{out / 'eval.md'} and {out / 'eval.png'}")])
