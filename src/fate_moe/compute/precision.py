"""Which experts of a step are computed from two bits instead of four?

From what the router chose alone, so that the output does not depend on the cache; but for light
experts, which the cache decides about. Whatever these choose changes the output: `mode:` names it,
`fate eval --compare` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fate_moe.errors import ConfigError
from fate_moe.types import Choice, Phase

LowExperts = Callable[[Choice], frozenset[int]]
"""From what a router chose in a step to the experts that are computed from their INT2 head."""


def never(choice: Choice) -> frozenset[int]:
    """Everything in four bits."""
    return frozenset()


def always(choice: Choice) -> frozenset[int]:
    """Everything in two bits."""
    return frozenset(choice.experts)


def tail(choice: Choice, share: float) -> frozenset[int]:
    """In prefill, the least popular experts that together take at most `share` of the tokens.

    Decode keeps four bits. Equal popularity: the higher id goes first.
    Source: Fate, arXiv 2502.12224, section on popularity-aware hybrid quantization (25 %).
    """
    if choice.phase is Phase.DECODE:
        return frozenset()
    counts = choice.counts or (1,) * len(choice.experts)
    left, low = share * sum(counts), []
    # The most popular come first, of equals the lower id.
    for expert, tokens in zip(reversed(choice.experts), reversed(counts), strict=True):
        left -= tokens
        if left < 0:
            break
        low.append(expert)
    return frozenset(low)


def light_experts(ids: Sequence[int], weights: Sequence[float], share: float) -> frozenset[int]:
    """Return the experts of one token whose share of its router weights is below `share`.

    Args:
        ids: chosen experts, [K].
        weights: theirs, [K], not below 0; they need not sum to 1.
        share: of 1.
    """
    least = share * sum(weights)
    return frozenset(e for e, weight in zip(ids, weights, strict=True) if weight < least)


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
