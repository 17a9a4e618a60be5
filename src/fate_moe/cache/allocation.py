"""How many slots does each layer get?

An allocation turns a number of slots into one capacity per MoE layer. Pure arithmetic.
Invariants: the sum is at most the slots given; no layer gets more slots than it has experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fate_moe.errors import ConfigError

Allocation = Callable[[Sequence[int], int, int], list[int]]


def even(experts: Sequence[int], slots: int, shallow_layers: int) -> list[int]:
    """Give every layer the same share; what one layer cannot use goes to the others.

    Args:
        experts: experts of each layer, [L].
        slots: slots to share out.
        shallow_layers: not used.
    Returns:
        Capacity of each layer, [L].
    """
    capacity = [0] * len(experts)
    hungry = list(range(len(experts)))
    left = slots
    while hungry:
        share, extra = divmod(left, len(hungry))
        full = [layer for layer in hungry if experts[layer] <= share]
        for layer in full:
            capacity[layer] = experts[layer]
            left -= experts[layer]
        if not full:
            for rank, layer in enumerate(hungry):
                capacity[layer] = share + (rank < extra)
            break
        hungry = [layer for layer in hungry if layer not in full]
    return capacity


def shallow(experts: Sequence[int], slots: int, shallow_layers: int) -> list[int]:
    """Keep the first layers whole, share the rest out evenly over the deeper ones.

    Shallow routers are nearly uniform, so their experts are the hardest to guess. Source: Fate
    (arXiv 2502.12224), "shallow-favoring expert cache"; four layers as in the authors' code
    (FFFzy/Fate_open, utils/memory_cost.py). Differs: the remainder of the division is handed
    out too, instead of left unused.

    Args:
        experts: experts of each layer, [L].
        slots: slots to share out.
        shallow_layers: how many first layers to keep whole.
    Returns:
        Capacity of each layer, [L].
    """
    capacity = [0] * len(experts)
    left = slots
    for layer in range(min(shallow_layers, len(experts))):
        capacity[layer] = min(experts[layer], left)
        left -= capacity[layer]
    capacity[shallow_layers:] = even(experts[shallow_layers:], left, 0)
    return capacity


ALLOCATIONS: dict[str, Allocation] = {"even": even, "shallow": shallow}


def allocate(name: str, experts: Sequence[int], slots: int, shallow_layers: int) -> list[int]:
    """Run the allocation called `name`.

    Raises:
        ConfigError: no such allocation.
    """
    if name not in ALLOCATIONS:
        raise ConfigError(f"allocation: {name!r} is none of {', '.join(sorted(ALLOCATIONS))}")
    return ALLOCATIONS[name](experts, slots, shallow_layers)
