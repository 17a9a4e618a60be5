"""How do several engines answer one prompt in turns, and what does each take?"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fate_moe.engine.demands import chunk_sizes
from fate_moe.engine.handle import Engine
from fate_moe.models.kv_cache import new_cache

_TOGETHER = 8  # tokens of one turn: 0.2 to 0.5 s of smolmoe, less than machines take to change


class Spent(NamedTuple):
    """What one request, or a part of it, took: reading the prompt, writing the answer."""

    read_s: float
    write_s: float
    read_bytes: int
    write_bytes: int

    @classmethod
    def of(cls, parts: Iterable[Spent]) -> Spent:
        """Add parts up."""
        return cls(*map(sum, zip(*parts, strict=True)))


def answer(engine: Engine, ids: Tensor, new_tokens: int) -> Spent:
    """Read a prompt, [1, T], and write greedily."""
    return Spent.of(_parts(engine, ids, new_tokens))


def answer_in_turns(engines: Sequence[Engine], ids: Tensor, new_tokens: int) -> list[Spent]:
    """Read a prompt, [1, T], with each engine, then write a few tokens with each, and so on.

    Returns:
        What each took, in the order of the engines, which is that of the turns.
    """
    turns = zip(*(_parts(engine, ids, new_tokens) for engine in engines), strict=True)
    return [Spent.of(parts) for parts in zip(*turns, strict=True)]


@torch.no_grad()
def _parts(engine: Engine, ids: Tensor, new_tokens: int) -> Iterator[Spent]:
    """Read a prompt, then write greedily, a few tokens at a time."""
    model: Any = engine.model
    cache, moved = new_cache(model), engine.mover.telemetry
    began_s, began = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
    ids = ids.to(engine.blueprint.device)
    for piece in torch.split(ids, chunk_sizes(ids.shape[1], engine.chunk_tokens), dim=1):
        logits = model(
            input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    logits.flatten()[:1].tolist()  # a GPU is done, too
    end_s, end = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
    yield Spent(end_s - began_s, 0.0, end - began, 0)
    for left in range(new_tokens, 0, -_TOGETHER):
        began_s, began = time.perf_counter(), end  # what landed between two turns is of this one
        for _ in range(min(left, _TOGETHER)):
            token = logits[:, -1:].argmax(dim=-1)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        logits.flatten()[:1].tolist()
        end_s, end = time.perf_counter(), moved.bytes_demand + moved.bytes_speculated
        yield Spent(0.0, end_s - began_s, 0, end - began)
