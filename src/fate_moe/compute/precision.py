"""Which experts of a step are computed from two bits instead of four?

Whatever these choose changes the output: `mode:` names it, `fate eval --compare` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fate_moe.errors import ConfigError

LowExperts = Callable[[Tensor], frozenset[int]]
"""From a step's topk_ids [T, K] to the experts that are computed from their INT2 head."""


def never(topk_ids: Tensor) -> frozenset[int]:
    """Everything in four bits."""
    return frozenset()


def always(topk_ids: Tensor) -> frozenset[int]:
    """Everything in two bits."""
    return frozenset(topk_ids.flatten().tolist())


def tail(topk_ids: Tensor, share: float) -> frozenset[int]:
    """In prefill, the least popular experts that together take at most `share` of the tokens.

    A step of one token is decode and keeps four bits. Equal popularity: the higher id goes first.
    Source: Fate, arXiv 2502.12224, section on popularity-aware hybrid quantization (25 %).
    """
    if topk_ids.shape[0] == 1:
        return frozenset()
    experts, tokens = torch.unique(topk_ids, return_counts=True)
    rising = tokens.flip(0).argsort(stable=True)
    taken = tokens.flip(0)[rising].cumsum(0) <= share * topk_ids.numel()
    return frozenset(experts.flip(0)[rising][taken].tolist())


def make_low_experts(name: str, share: float) -> LowExperts:
    """Return the choice of that name.

    Raises:
        ConfigError: there is none.
    """
    choices: dict[str, LowExperts] = {
        "never": never,
        "tail": partial(tail, share=share),
        "always": always,
    }
    if name not in choices:
        raise ConfigError(f"int2: {name!r} is none of {', '.join(choices)}")
    return choices[name]
