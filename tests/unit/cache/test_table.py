"""Where a demanded expert finds a slot."""

from fate_moe.cache import Entry, ExpertTable
from fate_moe.cache.allocation import Regions
from fate_moe.cache.lru import LRU
from fate_moe.types import Choice, ExpertKey


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


def lending() -> ExpertTable:
    """Four layers of four experts each, all resident, and one spare slot."""
    table = ExpertTable(Regions.per_layer([4] * 4), 1, LRU)
    for layer in range(4):
        for expert in range(4):
            entry = table.place_demand(ExpertKey(layer, expert))
            assert entry is not None
            table.landed(entry)
    return table


def residents(table: ExpertTable) -> list[int]:
    """How many experts of each layer are resident."""
    return [sum(e.key.layer == layer for e in table.entries()) for layer in range(4)]


def test_whose_turn_is_over_lends_first_and_at_most_half() -> None:
    table = lending()
    table.lend(4, layer=3)  # layer 2 is being computed
    assert table.spare_slots == 4
    assert residents(table) == [3, 2, 4, 4]
    table.check()
    table.lend(2, layer=3)
    table.lend(4, layer=1)
    assert residents(table) == [3, 2, 4, 4]
    table.lend(99, layer=3)
    assert residents(table) == [2, 2, 4, 4]  # neither who computes nor who is guessed for
    guesses = [table.place_guess(ExpertKey(3, 4 + expert)) for expert in range(5)]
    assert [guess is None for guess in guesses] == [False] * 5
    table.check()


def test_a_free_slot_is_lent_before_anybody_goes() -> None:
    table = ExpertTable(Regions.per_layer([4] * 3), 0, LRU)
    table.lend(2, layer=2)
    assert table.spare_slots == 2
    assert table.evictions == 0
    table.check()


def test_decode_has_its_slots_back() -> None:
    table = lending()
    table.lend(5, layer=3)
    guesses = [table.place_guess(ExpertKey(4 - n, 4 + n)) for n in range(1, 5)]
    late = guesses.pop()
    assert late is not None
    for guess in guesses:
        assert guess is not None
        table.landed(guess)
    table.begin(Choice(0, [0], 8))
    assert table.spare_slots == 5  # a prompt goes on
    table.begin(Choice(0, [0], 1))
    assert table.spare_slots == 1
    assert [key for e in table.entries() if (key := e.key).expert > 3] == [late.key]
    assert table.place_demand(ExpertKey(1, 9)) is not None
    table.check()
    assert table.emptied().spare_slots == 1


def test_what_is_being_read_keeps_its_lent_slot_until_it_is_there() -> None:
    table = lending()
    table.lend(3, layer=3)
    guesses = [table.place_guess(ExpertKey(3, 4 + n)) for n in range(3)]
    table.begin(Choice(0, [0], 1))
    assert table.spare_slots == 3
    assert table.emptied().spare_slots == 1
    for guess in guesses:
        assert guess is not None
        table.landed(guess)
    table.begin(Choice(1, [0], 1))
    assert table.spare_slots == 1
    table.check()
