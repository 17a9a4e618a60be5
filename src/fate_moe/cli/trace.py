"""`fate trace`: which experts does a model ask for?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.generate import messages, open_engine
from fate_moe.cli.terminal import TerminalProgress, emit_json, guarded, readable, show_report
from fate_moe.config import DEFAULT_POLICY
from fate_moe.errors import ConfigError, reason

if TYPE_CHECKING:
    from fate_moe.engine.handle import Engine
    from fate_moe.sim.trace import Trace

_FIELDS = ("prompt", "question", "query", "context")
_MOST_PROMPTS = 100_000
_ALWAYS = 1 << 16  # a window: guesses are made, and so recorded, whether they pay or not

Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="What to ask. May be given several times."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE",
        help="A prompt a line: plain text, or JSON objects with a field prompt, question, query or "
        "context.",
    ),
]  # fmt: skip
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first N prompts of the file."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The trace, for fate simulate.")
]


@app.command("trace")
@guarded
def trace(
    model: options.Model = "smolmoe",
    prompt: Prompts = None,
    prompts: PromptFile = None,
    limit: Limit = None,
    out: Out = Path("fate.trace"),
    max_new_tokens: options.MaxNewTokens = 128,
    ram: options.Ram = None,
    vram: options.Vram = None,
    experts: options.Experts = None,
    context: options.Context = None,
    policy: options.Policy = DEFAULT_POLICY,
    predictor: options.PredictorName = None,
    percentile: options.Percentile = None,
    compute: options.Compute = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Record what the routers choose, and what is guessed, while prompts are answered.

    The answers are thrown away, each prompt starts anew. The file holds no text.

    Examples:

        fate trace -p "Why is the sky blue?" -p "Write a haiku." -o haiku.trace

        fate trace Qwen/Qwen1.5-MoE-A2.7B-Chat --prompts gsm8k.jsonl --limit 20 -n 256 -o q.trace

        fate simulate q.trace --cache lru,arc,transition,belady --capacity 10%,25%,50%
    """
    texts = [*(prompt or []), *(read_prompts(prompts, limit) if prompts else [])]
    texts = [readable(text, "prompt") for text in texts]
    if not texts:
        raise ConfigError("prompt: none given; try fate trace -p 'Why is the sky blue?'")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out: {out.parent}: there is no such folder")
    engine, tokenizer = open_engine(
        model, revision, cache_dir,
        policy=policy, ram=ram, vram=vram, experts=experts, context_tokens=context,
        predictor=predictor,
        percentile=percentile, window=_ALWAYS, compute=compute, dtype=dtype, threads=threads,
    )  # fmt: skip
    try:
        found = _record(engine, tokenizer, texts, max_new_tokens)
    finally:
        engine.close()
    from fate_moe.sim.trace_file import write_packed

    write_packed(found, out)
    _show(found, len(texts), out, json_out)


def _record(engine: Engine, tokenizer: object, texts: list[str], new_tokens: int) -> Trace:
    from fate_moe.engine.generate import Conversation, Sampling
    from fate_moe.engine.record import Recorder

    conversation = Conversation(engine, tokenizer)
    sampling = Sampling(new_tokens)
    with TerminalProgress() as progress, Recorder(engine) as recorder:
        for done, text in enumerate(texts):
            progress("answering prompts", done, len(texts))
            has_template = getattr(tokenizer, "chat_template", None)
            conversation.ask(messages(None, text) if has_template else text, sampling)
            conversation.forget()
        progress("answering prompts", len(texts), len(texts))
    return recorder.trace


def read_prompts(path: Path, limit: int | None) -> list[str]:
    """Read the prompts of a file.

    Raises:
        ConfigError: it cannot be read, is empty, or a line has no prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"prompts: {path}: cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {path}: it is no UTF-8 text: {error.reason}") from error
    lines = lines[:limit]
    if not 1 <= len(lines) <= _MOST_PROMPTS:
        raise ConfigError(f"prompts: {path}: {len(lines)} lines, need 1 to {_MOST_PROMPTS}")
    return [_prompt_of(line, f"prompts: {path}: line {n}") for n, line in enumerate(lines, 1)]


def _prompt_of(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    text = next((row[name] for name in _FIELDS if isinstance(row.get(name), str)), "")
    if not text.strip():
        raise ConfigError(f"{where}: none of the fields {', '.join(_FIELDS)} holds a text")
    return str(text)


def _show(found: Trace, prompts: int, out: Path, json_out: bool) -> None:
    from fate_moe.sim.trace import summarize

    facts = summarize(found)
    if json_out:
        emit_json({"out": str(out), "prompts": prompts, **asdict(facts)})
        return
    recall = "-" if facts.recall is None else f"{100 * facts.recall:.1f} %"
    show_report(
        [
            ("steps", f"{facts.steps}, {facts.decode_steps} of them of one token"),
            ("requests", f"{facts.requests} of {facts.layers} layers"),
            ("guesses", f"{found.predictor or 'none'}, recall {recall}"),
            ("written", f"{out} ({out.stat().st_size} bytes)"),
        ]
    )
