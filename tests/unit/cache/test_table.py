"""Where a demanded expert finds a slot."""

from fate_moe.cache import Entry, ExpertTable
from fate_moe.cache.allocation import Regions
from fate_moe.cache.lru import LRU
from fate_moe.types import ExpertKey


class Proud(LRU):
    """Takes nobody new once it is full."""

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        return False


def demand(table: ExpertTable, expert: int) -> Entry | None:
    key = ExpertKey(0, expert)
    table.note_miss(key)
    entry = table.place_demand(key)
    if entry is not None:
        table.landed(entry)
    table.check()
    return entry


def test_an_expert_that_is_not_admitted_lives_in_a_spare_slot_for_its_lease() -> None:
    table = ExpertTable(Regions.per_layer([1]), 1, Proud)
    first = demand(table, 0)
    key = ExpertKey(0, 1)
    table.note_miss(key)
    second = table.place_demand(key)
    assert first is not None
    assert second is not None
    assert (first.spare, second.spare) == (False, True)
    second.locks += 1
    table.landed(second)
    assert table.get(key) is second
    table.unlock(second)
    assert table.get(key) is None
    assert table.get(ExpertKey(0, 0)) is first


def test_without_a_spare_slot_it_takes_somebodys_place_after_all() -> None:
    table = ExpertTable(Regions.per_layer([1]), 1, Proud)
    demand(table, 0)
    spare = table.place_demand(ExpertKey(0, 1))
    assert spare is not None
    spare.locks += 1  # and it stays
    table.landed(spare)
    third = demand(table, 2)
    assert third is not None
    assert not third.spare
    assert table.get(ExpertKey(0, 0)) is None
    assert table.evictions == 1


def test_layers_of_one_region_share_its_slots() -> None:
    table = ExpertTable(Regions((2,), (0, 0, 0)), 0, LRU)
    for layer in range(3):
        entry = table.place_demand(ExpertKey(layer, 5))
        assert entry is not None
        table.landed(entry)
        table.check()
    assert [table.get(ExpertKey(layer, 5)) is None for layer in range(3)] == [True, False, False]
