"""Allocations hand out every slot they may, and no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.cache.allocation import ALLOCATIONS, allocate, make_regions
from fate_moe.errors import ConfigError


@given(
    experts=st.lists(st.integers(0, 64), min_size=1, max_size=40),
    slots=st.integers(0, 3000),
    shallow_layers=st.integers(0, 50),
)
@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_hands_out_all_that_fits(
    name: str, experts: list[int], slots: int, shallow_layers: int
) -> None:
    capacity = allocate(name, experts, slots, shallow_layers)
    assert len(capacity) == len(experts)
    assert all(0 <= c <= e for c, e in zip(capacity, experts, strict=True))
    assert sum(capacity) == min(slots, sum(experts))


def test_shallow_keeps_the_first_layers_whole() -> None:
    # The paper's Qwen1.5-MoE at 8 GB: 555 slots = 4 whole layers of 60 and 15 for each deep one.
    capacity = allocate("shallow", [60] * 24, 555, 4)
    assert capacity[:4] == [60] * 4
    assert capacity[4:] == [16] * 15 + [15] * 5


def test_shallow_below_four_layers_fills_from_the_first() -> None:
    assert allocate("shallow", [60] * 24, 158, 4) == [60, 60, 38] + [0] * 21


def test_even_shares_what_small_layers_leave() -> None:
    assert allocate("even", [2, 10, 10], 14, 0) == [2, 6, 6]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="even, global, shallow"):
        allocate("deep", [4], 2, 4)


def test_one_region_for_all() -> None:
    regions = make_regions("global", [4, 6], 8, 4)
    assert (regions.capacities, regions.of_layer, regions.slots) == ((8,), (0, 0), 8)
    assert regions.of_layers == [8, 8]
    assert not regions.holds_whole(0, [4, 6])  # the region's layers together have ten experts
    assert make_regions("global", [4, 6], 99, 4).slots == 10
    assert make_regions("global", [4, 6], 99, 4).holds_whole(1, [4, 6])


def test_a_region_per_layer() -> None:
    regions = make_regions("shallow", [4, 6], 7, 1)
    assert (regions.capacities, regions.of_layer) == ((4, 3), (0, 1))
    assert [regions.holds_whole(layer, [4, 6]) for layer in range(2)] == [True, False]
