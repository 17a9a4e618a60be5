"""`fate generate`: one prompt, one answer, one report."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.terminal import (
    PromptBar,
    TerminalProgress,
    default_cache_dir,
    emit_json,
    guarded,
    readable,
    say,
    show_report,
)
from fate_moe.config import DEFAULT_POLICY
from fate_moe.errors import ConfigError, FateError

if TYPE_CHECKING:
    from fate_moe.engine.generate import Answer, Conversation, Message, Sampling
    from fate_moe.engine.handle import Engine

_FAR = 10  # times what was reached: a link that allows more is no limit, and not worth a word
_HINT = "try fate generate -p 'Why is the sky blue?'"

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What to ask; - or nothing reads it from stdin.",
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        rich_help_panel=options.ANSWER,
        help="Continue the text as it is, without the chat template.",
    ),
]


@app.command()
@guarded
def generate(
    model: options.Model = "smolmoe",
    prompt: Prompt = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    system: options.System = None,
    raw: Raw = False,
    ram: options.Ram = None,
    vram: options.Vram = None,
    experts: options.Experts = None,
    context: options.Context = None,
    policy: options.Policy = DEFAULT_POLICY,
    predictor: options.PredictorName = None,
    cache: options.CacheName = None,
    allocation: options.AllocationName = None,
    percentile: options.Percentile = None,
    window: options.Window = None,
    compute: options.Compute = None,
    dtype: options.Dtype = None,
    int2_share: options.Int2Share = None,
    int2_on_miss: options.Int2OnMiss = None,
    routing_bias: options.RoutingBias = None,
    exact: options.Exact = False,
    threads: options.Threads = None,
    io_threads: options.IoThreads = None,
    verify: options.Verify = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Answer one prompt and report what it cost.

    The answer goes to stdout, the report to stderr.

    Examples:

        fate generate -p "What is the capital of France?" --experts 50%

        fate generate Qwen/Qwen1.5-MoE-A2.7B-Chat -p "Why is the sky blue?" --ram 6GiB

        fate generate Qwen/Qwen3-30B-A3B -p "Hello" --vram 8GiB --ram 20GiB

        git diff | fate generate --raw -n 64 --json
    """
    text = _read_prompt(prompt)
    from fate_moe.engine.generate import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    engine, tokenizer = open_engine(
        model, revision, cache_dir,
        policy=policy, ram=ram, vram=vram, experts=experts, context_tokens=context,
        predictor=predictor,
        percentile=percentile, window=window, cache=cache, allocation=allocation,
        compute=compute, dtype=dtype, **options.two_bits(int2_share),
        **options.in_decode(int2_on_miss, routing_bias, exact),
        threads=threads, io_threads=io_threads, verify=verify,
    )  # fmt: skip
    try:
        conversation = Conversation(engine, tokenizer)
        asked = text if raw or not tokenizer.chat_template else messages(system, text)
        if json_out:
            answer = _ask_with_bar(conversation, asked, sampling)
            emit_json(as_json(answer, engine))
            return
        with PromptBar() as bar:
            answer = conversation.ask(asked, sampling, bar.before(say), bar.tell)
        say("\n")
        show_report(speed_rows(answer) + engine.report().rows())
    finally:
        engine.close()


def _ask_with_bar(
    conversation: Conversation, asked: str | list[Message], sampling: Sampling
) -> Answer:
    """Ask without showing the answer: a bar stands for it."""
    pieces = itertools.count(1)
    with TerminalProgress() as progress:
        progress("answering", 0, sampling.max_new_tokens)
        return conversation.ask(
            asked,
            sampling,
            lambda _: progress("answering", next(pieces), sampling.max_new_tokens),
            partial(progress, "reading the prompt"),
        )


def open_engine(
    model: str, revision: str | None, cache_dir: Any, **settings: Any
) -> tuple[Engine, Any]:
    """Load a model with progress bars; the settings are those of `fate_moe.load`."""
    with TerminalProgress() as progress:
        progress("starting", 0, 1)
        import fate_moe

        progress("starting", 1, 1)
        loaded, tokenizer = fate_moe.load(
            model,
            revision=revision,
            cache_dir=cache_dir or default_cache_dir(),
            progress=progress,
            **settings,
        )
    return loaded.fate, tokenizer


def messages(system: str | None, text: str) -> list[Message]:
    """Return the start of a conversation."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def speed_rows(answer: Answer) -> list[tuple[str, str]]:
    """Return an answer's speed as report rows."""
    decode = f"{answer.new_tokens} tokens"
    reached, allowed = answer.decode_tok_s, answer.ceiling_tok_s
    if reached is not None:
        decode += f", {reached:.1f} tok/s"
        if allowed is not None and allowed <= _FAR * reached:
            decode += f" (link allows {allowed:.1f} tok/s)"
    return [
        (
            "prefill",
            f"{answer.prompt_tokens} tokens, first token after {answer.ttft_s:.2f} s "
            f"({answer.prefill_tok_s:.1f} tok/s)",
        ),
        ("decode", decode),
    ]


def as_json(answer: Answer, engine: Engine) -> dict[str, object]:
    """Return the contract's object: the answer, its speed and the engine's report."""
    return {**asdict(answer), **asdict(engine.report())}


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ConfigError(f"prompt: none given; {_HINT}")
    from_stdin = prompt in (None, "-")
    try:
        text = sys.stdin.read() if from_stdin else str(prompt)
    except UnicodeDecodeError as error:
        raise FateError(f"prompt: stdin is no UTF-8 text: {error.reason}") from error
    if not text.strip():
        empty = f"none given and stdin is empty; {_HINT}" if from_stdin else "it is empty"
        raise ConfigError(f"prompt: {empty}")
    return readable(text, "prompt")
