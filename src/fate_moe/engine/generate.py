"""How does a prompt become an answer, and how fast was it?

Drives transformers' own `generate`: greedy or sampled, streamed, one conversation at a time. The
key/value cache of a conversation is kept, so a new turn only reads what is new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fate_moe.engine.demands import chunk_sizes
from fate_moe.engine.handle import Engine
from fate_moe.engine.prompt import OnPrompt, read_all_but_last, told
from fate_moe.errors import ConfigError, ModelError
from fate_moe.models.kv_cache import new_cache
from fate_moe.models.load import quiet_transformers

OnText = Callable[[str], None]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest (greedy)."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max-new-tokens: have {self.max_new_tokens}, need 1 or more")
        if not 0 <= self.temperature <= 10:
            raise ConfigError(f"temperature: have {self.temperature}, need 0 to 10")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: have {self.seed}, need 0 to 2**63 - 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p: have {self.top_p}, need more than 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and its speed.

    Attributes:
        text: the answer without special tokens.
        token_ids: the answer's tokens, the end token included.
        prompt_tokens: tokens of the prompt, reused ones included.
        new_tokens: tokens generated.
        ttft_s: time to the first token.
        prefill_tok_s: new prompt tokens / ttft_s.
        decode_tok_s: tokens after the first / their time; None for a single token.
        ceiling_tok_s: what the measured link allows at the bytes that decoding moved; None when
            it moved none.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float | None
    ceiling_tok_s: float | None


class Conversation:
    """Asks one engine, turn after turn; owns the key/value cache.

    Raises:
        ModelError: the model does not generate text.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        if not engine.model.can_generate():
            family = engine.model.config.model_type
            raise ModelError(f"{family}: its models score text and generate none")
        self.engine = engine
        self._tokenizer = tokenizer
        self._seen: list[int] = []  # tokens that the key/value cache holds
        self._kv: Any = None

    def ask(
        self,
        prompt: str | Sequence[Message],
        sampling: Sampling,
        on_text: OnText = lambda text: None,
        on_prompt: OnPrompt = lambda done, total: None,
    ) -> Answer:
        """Answer a prompt.

        Args:
            prompt: raw text, or chat messages for the model's chat template.
            sampling: how tokens are chosen.
            on_text: receives the answer piece by piece.
            on_prompt: told how many of how many new tokens are read, before each MoE layer.
        Raises:
            ConfigError: the prompt is empty or longer than the context.
            ReadError: an expert could not be read; the next call works.
        """
        ids = self._encode(prompt)
        room = self.engine.context_tokens - len(ids)
        if room < 1:
            raise ConfigError(
                f"prompt: {len(ids)} tokens, the context takes {self.engine.context_tokens} with "
                "the answer; shorten the prompt or raise --context"
            )
        reused = self._reuse(ids)
        # Without a cache of ours the prompt has to go through in one piece.
        most = len(ids) if self._kv is None else self.engine.chunk_tokens
        sizes = chunk_sizes(len(ids) - reused, most)
        clock = _Clock(self.engine, self._tokenizer, on_text)
        try:
            with told(self.engine, sizes, on_prompt):
                read_all_but_last(self.engine, self._kv, ids[reused:], sizes)
                out = self._generate(ids, min(sampling.max_new_tokens, room), sampling, clock)
        except BaseException:
            self.forget()  # the cache may hold half a step
            raise
        self._seen = [] if self._kv is None else out[: self._kv.get_seq_length()]
        return clock.answer(out[len(ids) :], len(ids), len(ids) - reused)

    def forget(self) -> None:
        """Start the next prompt from nothing."""
        self._seen, self._kv = [], None

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        with quiet_transformers():
            if isinstance(prompt, str):
                ids = self._tokenizer(prompt)["input_ids"]
            else:
                ids = self._tokenizer.apply_chat_template(
                    list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
        if not ids:
            raise ConfigError("prompt: it is empty; give at least one token")
        return [int(i) for i in ids]

    def _reuse(self, ids: list[int]) -> int:
        """Cut the key/value cache back to what `ids` shares with it; return how much that is."""
        same = 0
        # The last token must go through the model again: its scores are the answer's start.
        for old, new in zip(self._seen, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        surplus = len(self._seen) - same
        if self._kv is not None and same and surplus:
            try:
                self._kv.crop(-surplus)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError):
                same = 0  # sliding-window caches cannot go back
        if self._kv is None or not same:
            self._kv, same = new_cache(self.engine.model), 0
        return same

    def _generate(
        self, ids: list[int], max_new_tokens: int, sampling: Sampling, clock: _Clock
    ) -> list[int]:
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        tokens = torch.tensor([ids], device=self.engine.blueprint.device)
        greedy = sampling.temperature == 0
        choice: dict[str, float] = {}
        if not greedy:  # nothing but what the user named: no top-k of 50
            choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        out: Tensor = self.engine.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self._kv,
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            streamer=clock,
            **choice,
        )
        ids_out: list[int] = out[0].tolist()
        return ids_out


class _Clock:
    """transformers' streamer protocol: times the tokens and decodes them as they come."""

    def __init__(self, engine: Engine, tokenizer: Any, on_text: OnText) -> None:
        from transformers import TextStreamer

        class Stream(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    on_text(text)

        self._engine = engine
        self._tokenizer = tokenizer
        self._stream = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._began_s = time.perf_counter()
        self._times_s: list[float] = []
        self._moved_at_first = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Receive the prompt once, then each token."""
        if self._prompt_seen:
            if not self._times_s:
                self._moved_at_first = self._moved_bytes()
            self._times_s.append(time.perf_counter())
        self._prompt_seen = True
        self._stream.put(value)

    def end(self) -> None:
        """Flush what the tokenizer held back."""
        self._stream.end()

    def answer(self, new_ids: list[int], prompt_tokens: int, new_prompt_tokens: int) -> Answer:
        """Sum up after the last token."""
        ttft_s = self._times_s[0] - self._began_s
        decoded, decode_s = len(self._times_s) - 1, self._times_s[-1] - self._times_s[0]
        moved = self._moved_bytes() - self._moved_at_first
        rate = self._engine.mover.link.bytes_per_s
        return Answer(
            text=self._tokenizer.decode(new_ids, skip_special_tokens=True),
            token_ids=tuple(new_ids),
            prompt_tokens=prompt_tokens,
            new_tokens=len(new_ids),
            ttft_s=ttft_s,
            prefill_tok_s=new_prompt_tokens / ttft_s,
            decode_tok_s=decoded / decode_s if decoded else None,
            ceiling_tok_s=rate * decoded / moved if rate and decoded and moved else None,
        )

    def _moved_bytes(self) -> int:
        telemetry = self._engine.mover.telemetry
        return telemetry.bytes_demand + telemetry.bytes_speculated
