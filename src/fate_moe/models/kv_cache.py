"""Which key/value cache does a family take, and how large does it get?

Families keep keys and values, latent vectors, the inputs of an indexer, or the states of a
recurrence. No formula over config fields knows them all, so the family's own code is asked: it runs
on a few tokens on the meta device, where nothing is computed, and what its cache then holds is
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.models.meta import RememberedShapes
from fate_moe.models.seam import find_experts

_PROBES = 4, 7, 8
"""Tokens that are tried. Past the last, a cache grows by no more a token than somewhere between
them: a sliding window stops growing, states never do, and what is compressed was whole before."""


_READS_WHOLE = frozenset({"jamba"})
"""Model types whose code starts its recurrent states over in each step of several tokens, as of
transformers 5.23: it neither takes a prompt in pieces nor goes on from an earlier one."""


def new_cache(model: Any) -> Any | None:
    """Make an empty key/value cache to read prompts into, in pieces and turn after turn.

    None where the family makes one of its own kind, or must read every prompt as a whole.
    """
    from transformers import DynamicCache

    # Not public, but it is what `generate` itself goes by.
    if not (model.can_generate() and model._supports_default_dynamic_cache()):
        return None
    text = model.config.get_text_config(decoder=True)
    if text.model_type in _READS_WHOLE:
        return None
    cache = DynamicCache(config=text)
    # Such a layer keeps the prompt for good, and takes what comes first for all of it: it can
    # neither be given a prompt in pieces nor go on from an earlier one.
    if any(hasattr(layer, "set_prefill_length") for layer in cache.layers):
        return None
    return cache


def chunks_continue(model: Any) -> bool:
    """Say whether transformers' chunked prefill goes on from a cache that holds tokens already.

    5.14 starts over and reads them twice; 5.23 is known to go on.
    """
    from transformers import __version__

    major, minor = (int(part) for part in __version__.split(".")[:2])
    return (major, minor) >= (5, 23) and new_cache(model) is not None


def kv_growth(module: Any, dtype: torch.dtype) -> Callable[[int], int]:
    """Return what says how many bytes the cache of a conversation of so many tokens holds, at most.

    The tokens are those of prompt and answer together.

    Args:
        module: a transformers model on the meta device.
        dtype: what the model computes in. States that it keeps wider are counted as they are.
    """
    from torch.fx.experimental import _config as shapes

    # A family's code may do what has no meaning without data, such as reading a number; its own
    # words for that are many.
    refusals = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        with (
            _experts_passed_over(module),
            shapes.patch(meta_nonzero_assume_all_nonzero=True),  # type: ignore[attr-defined]
            RememberedShapes(),
        ):
            held = [_held_bytes(module, count, dtype) for count in _PROBES]
    except refusals:
        each = bytes_per_token(module.config.get_text_config(decoder=True), dtype)
        return lambda tokens: tokens * each
    probed = list(zip(_PROBES, held, strict=True))
    steepest = max((y - x) / (n - m) for (m, x), (n, y) in pairwise(probed))
    return lambda tokens: max(*held, held[0] + ceil(steepest * (tokens - _PROBES[0])))


def values_of(config: Any, name: str) -> list[Any]:
    """Return what a config says under a name: one value, or each layer's where they differ."""
    if not getattr(config, "is_heterogeneous", False):
        return [getattr(config, name, None)]
    if name not in config.per_layer_attributes:
        return [getattr(config, name, None)]
    return [getattr(layer, name, None) for layer in config.per_layer_config]


def most_of(config: Any, *names: str) -> int:
    """Return the largest whole number a config has under any of the names, in any layer, or 0."""
    values = [value for name in names for value in values_of(config, name)]
    return max((value for value in values if isinstance(value, int)), default=0)


def tensors_of(held: Any) -> list[Tensor]:
    """Find all tensors that an object holds, however deep, each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    left = [held]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            found[id(one)] = one
        elif id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            if isinstance(one, list | tuple):
                left.extend(one)
            else:
                left.extend(
                    (one if isinstance(one, dict) else getattr(one, "__dict__", {})).values()
                )
    return list(found.values())


@torch.no_grad()
def _held_bytes(module: Any, tokens: int, dtype: torch.dtype) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    cache = new_cache(module)
    out = module(input_ids=ids, past_key_values=cache, use_cache=True)
    if cache is None and module.can_generate():
        cache = out.past_key_values
    own = module.dtype
    return sum(
        tensor.numel() * (dtype if tensor.dtype is own else tensor.dtype).itemsize
        for tensor in tensors_of(cache)
    )


@contextmanager
def _experts_passed_over(module: nn.Module) -> Iterator[None]:
    """Within the scope, experts hand on what they get: they leave nothing in a cache."""
    experts = list(find_experts(module).values())
    for one in experts:
        one.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield
    finally:
        for one in experts:
            del one.forward


def bytes_per_token(text: Any, dtype: torch.dtype) -> int:
    """Bound one token by the config alone: every head of every layer, with the widest of each."""
    heads = most_of(text, "num_attention_heads", "num_key_value_heads", "swa_num_key_value_heads")
    width = max(
        most_of(text, "head_dim", "v_head_dim", "swa_head_dim"),
        most_of(text, "qk_nope_head_dim") + most_of(text, "qk_rope_head_dim"),
    )
    width = width or most_of(text, "hidden_size") // max(heads, 1)
    index = most_of(text, "index_head_dim", "indexer_head_dim")
    per_layer = 2 * heads * width + index
    return most_of(text, "num_hidden_layers") * per_layer * dtype.itemsize
