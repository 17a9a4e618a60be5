"""How does a prompt go through the model, and how far is it?

In chunks: every chunk reads nearly all experts once more, its activations are what it costs in
memory (`demands` says how long it may be). Within a chunk layer follows layer, which is where a
person who waits can be told something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fate_moe.engine.handle import Engine

OnPrompt = Callable[[int, int], None]
"""Told how many of how many tokens are read, as far as one can say within a chunk."""


@torch.no_grad()
def read_all_but_last(engine: Engine, kv: Any, ids: Sequence[int], sizes: Sequence[int]) -> None:
    """Read all chunks of a prompt but its last, which brings the answer's first token.

    Not left to transformers' `prefill_chunk_size`: before 5.23 it starts over from the first
    token even when the cache holds some.

    Args:
        kv: the key/value cache.
        ids: what it does not hold yet.
        sizes: of the chunks, in tokens.
    """
    start = 0
    for size in sizes[:-1]:
        piece = torch.tensor([list(ids[start : start + size])], device=engine.blueprint.device)
        engine.model(input_ids=piece, past_key_values=kv, use_cache=True, logits_to_keep=1)
        start += size


@contextmanager
def told(engine: Engine, sizes: Sequence[int], on_prompt: OnPrompt) -> Iterator[None]:
    """Within the scope, call `on_prompt` before each MoE layer, until a prompt has been read.

    Args:
        sizes: of the prompt's chunks, in tokens; about equal.
    """
    layers = [layer for layer in engine.decoder_layers if layer is not None]
    total, calls, done = sum(sizes), len(sizes) * len(layers), 0

    def before_layer(module: object, args: object) -> None:
        nonlocal done
        on_prompt(total * done // calls, total)
        done += 1
        if done == calls:
            remove()

    hooks = [layer.register_forward_pre_hook(before_layer) for layer in layers]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    try:
        yield
    finally:
        remove()
