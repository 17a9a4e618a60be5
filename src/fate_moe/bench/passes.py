"""How long does one pass of reading or of writing take, whatever program runs the model?

Random tokens are read, or are written whatever the model says: llama-bench does the same, and a
model with random weights left to itself repeats a token, whose experts are then all in memory.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fate_moe.engine.demands import SHORT_CHUNK_TOKENS, chunk_sizes
from fate_moe.errors import ConfigError
from fate_moe.models.kv_cache import new_cache


def time_pass(
    model: Any,
    stage: str,
    tokens: int,
    ids: torch.Generator,
    chunk_tokens: int = SHORT_CHUNK_TOKENS,
) -> list[float]:
    """Read or write `tokens` random tokens from an empty cache.

    Args:
        model: a transformers causal language model.
        stage: prefill or decode.
        ids: where the tokens come from.
        chunk_tokens: most of the tokens that are read at once.
    Returns:
        Seconds of each step: of a chunk of the prompt, or of a token.
    Raises:
        ConfigError: another stage.
    """
    if stage == "prefill":
        return _prefill(model, tokens, ids, chunk_tokens)
    if stage == "decode":
        return _decode(model, tokens, ids)
    raise ConfigError(f"stage: {stage!r:.40} is none of prefill, decode")


@torch.no_grad()
def _prefill(model: Any, tokens: int, ids: torch.Generator, most: int) -> list[float]:
    prompt = _random_ids(model, tokens, ids)
    cache, steps = new_cache(model), []
    sizes = [tokens] if cache is None else chunk_sizes(tokens, most)
    for chunk in torch.split(prompt, sizes, dim=1):
        began_s = time.perf_counter()
        model(
            input_ids=chunk, past_key_values=cache,
            use_cache=cache is not None, logits_to_keep=1,
        )  # fmt: skip
        steps.append(time.perf_counter() - began_s)
    return steps


def _decode(model: Any, tokens: int, ids: torch.Generator) -> list[float]:
    model.generation_config.eos_token_id = None  # a random token may be one
    forced, clock = _Forced(_random_ids(model, tokens + 1, ids)[0].tolist()), _Clock()
    prompt = _random_ids(model, 1, ids)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=new_cache(model),
        max_new_tokens=tokens + 1,
        do_sample=False,
        logits_processor=[forced],
        streamer=clock,
    )
    # The first token is the prompt's, and whatever `generate` prepares.
    times = clock.times_s[1:]
    return [after - before for before, after in pairwise(times)]


def _random_ids(model: Any, count: int, ids: torch.Generator) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (1, count), generator=ids)


class _Forced:
    """A logits processor that makes given ids the likeliest, one a step."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, next(self._ids)] = float("inf")
        return scores


class _Clock:
    """A streamer that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
