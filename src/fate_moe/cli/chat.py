"""`fate chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.generate import open_engine, speed_rows
from fate_moe.cli.terminal import PromptBar, guarded, readable, say, show_report, stderr, tell
from fate_moe.config import DEFAULT_POLICY
from fate_moe.errors import ConfigError, FateError

if TYPE_CHECKING:
    from fate_moe.engine.generate import Answer, Conversation, Message, Sampling

HELP = "/stats shows the report, /reset starts anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@app.command()
@guarded
def chat(
    model: options.Model = "smolmoe",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    system: options.System = None,
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
) -> None:
    """Talk with a model; it remembers the conversation.

    Inside: /stats shows the live report, /reset starts anew, /help lists the rest.

    Example:

        fate chat --experts 25% --temperature 0.7
    """
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
        if not tokenizer.chat_template:
            raise ConfigError(f"{model}: no chat template; use fate generate --raw")
        start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        Dialogue(Conversation(engine, tokenizer), sampling, start).run()
    finally:
        engine.close()


class Dialogue:
    """The loop between a person and a conversation."""

    def __init__(
        self, conversation: Conversation, sampling: Sampling, start: list[Message]
    ) -> None:
        self._conversation = conversation
        self._sampling = sampling
        self._start = start
        self._messages = list(start)
        self._last: Answer | None = None
        self._since = "the start"  # what is counted

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        tell(HELP, style="dim")
        while (line := self._read_line()) is not None:
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _read_line(self) -> str | None:
        if sys.stdin.isatty():
            stderr.print("[bold cyan]> [/bold cyan]", end="")
        try:
            return readable(input().strip(), "line")
        except EOFError:
            return None
        except (ConfigError, UnicodeDecodeError):
            tell("that line is no UTF-8 text", "fate: ")
            return ""

    def _command(self, line: str) -> None:
        if line == "/stats":
            last = [] if self._last is None else [("last answer", None), *speed_rows(self._last)]
            every = (f"all answers since {self._since}", None)
            show_report([*last, every, *self._conversation.engine.report().rows()])
        elif line == "/reset":
            self._messages, self._last, self._since = list(self._start), None, "/reset"
            self._conversation.forget()
            self._conversation.engine.reset()
            stderr.print("[dim]forgotten[/dim]")
        elif line == "/help":
            tell(HELP)
        else:
            tell(f"unknown command {line}; {HELP}")

    def _turn(self, text: str) -> None:
        asked = [*self._messages, {"role": "user", "content": text}]
        heard: list[str] = []

        def on_text(piece: str) -> None:
            heard.append(piece)
            say(piece)

        try:
            with PromptBar() as bar:
                self._last = self._conversation.ask(
                    asked, self._sampling, bar.before(on_text), bar.tell
                )
        except KeyboardInterrupt:
            self._last = None  # nobody timed it
            stderr.print("\n[dim]stopped[/dim]")
        except FateError as error:
            tell(f"{error}; /reset starts anew", "fate: ")
            return
        say("\n")
        self._messages = [*asked, {"role": "assistant", "content": "".join(heard)}]
