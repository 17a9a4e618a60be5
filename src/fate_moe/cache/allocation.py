"""How many slots does each layer get?

An allocation turns a number of slots into one capacity per MoE layer. Pure arithmetic.
Invariants: the sum is at most the slots given; no layer gets more slots than it has experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


SHARED = "global"
"""All layers share one region."""


class Regions(NamedTuple):
    """Slots that share one fate.

    Attributes:
        capacities: slots of each region, [R].
        of_layer: the region of each layer, [L].
    """

    capacities: tuple[int, ...]
    of_layer: tuple[int, ...]

    @classmethod
    def per_layer(cls, capacities: Sequence[int]) -> Regions:
        """Give each layer a region of its own."""
        return cls(tuple(capacities), tuple(range(len(capacities))))

    @property
    def slots(self) -> int:
        """All of them."""
        return sum(self.capacities)

    @property
    def of_layers(self) -> list[int]:
        """Slots of each layer's region, [L]."""
        return [self.capacities[region] for region in self.of_layer]

    def holds_whole(self, layer: int, experts: Sequence[int]) -> bool:
        """Say whether all experts of a layer's region fit; `experts` is E of each layer, [L]."""
        own = self.of_layer[layer]
        inside = (n for n, region in zip(experts, self.of_layer, strict=True) if region == own)
        return self.capacities[own] >= sum(inside)


def make_regions(name: str, experts: Sequence[int], slots: int, shallow_layers: int) -> Regions:
    """Share slots out by the allocation called `name`: a region per layer, or one for all.

    Raises:
        ConfigError: no such allocation.
    """
    if name == SHARED:
        return Regions((min(slots, sum(experts)),), (0,) * len(experts))
    return Regions.per_layer(allocate(name, experts, slots, shallow_layers))


def allocate(name: str, experts: Sequence[int], slots: int, shallow_layers: int) -> list[int]:
    """Run the allocation called `name`.

    Raises:
        ConfigError: no such allocation.
    """
    if name not in ALLOCATIONS:
        known = ", ".join(sorted([*ALLOCATIONS, SHARED]))
        raise ConfigError(f"allocation: {name!r} is none of {known}")
    return ALLOCATIONS[name](experts, slots, shallow_layers)
