"""Layers that a token passes without a lease: told of who is where, booked as leases would be."""

import threading
from collections.abc import Callable, Sequence

import pytest

from fate_moe.prefetch.passing import Passed, Passing, Place
from fate_moe.types import Choice, ExpertKey, Phase
from tests.unit.prefetch.test_mover import Bench, bench, guess  # noqa: F401

COUNT = 3
Make = Callable[..., Bench]


class Traveller:
    """A `Passing`, and where it was told that experts lie."""

    def __init__(self, b: Bench, layers: Sequence[int] = (0, 1), count: int = COUNT) -> None:
        self.bench = b
        self.learned: list[tuple[int, list[int]]] = []
        learn = lambda layer, experts: self.learned.append((layer, list(experts)))  # noqa: E731
        self.passing = Passing(b.mover, learn, dict.fromkeys(layers, count))
        self.slots: dict[ExpertKey, int] = {}
        self.told: list[Place] = []

    def place(self, moved: list[Place]) -> None:
        self.told = moved
        for key, slot in moved:
            self.slots.pop(key, None)
            if slot is not None:
                self.slots[key] = slot

    def open(self) -> set[tuple[int, int]]:
        """Open, check the bytes of whoever is resident, and say who is."""
        self.passing.open(self.place)
        for (layer, expert), slot in self.slots.items():
            assert set(self.bench.view(slot)) == {10 * layer + expert}
        return {(layer, expert) for layer, expert in self.slots}

    def see(self) -> set[tuple[int, int]]:
        found = self.open()
        self.passing.close([])
        return found


def passed(layer: int, *experts: int, at: float = 1.0, took: float = 0.5) -> Passed:
    return Passed(layer, experts, at, took)


def preload(b: Bench, layers: int = 2) -> None:
    keys = [ExpertKey(layer, expert) for layer in range(layers) for expert in range(COUNT)]
    b.mover.preload(keys, lambda done: None)


@pytest.fixture
def filled(bench: Make) -> Bench:  # noqa: F811
    b = bench([COUNT, COUNT], 1)
    preload(b)
    return b


def test_all_that_is_resident_may_be_passed(filled: Bench) -> None:
    assert Traveller(filled).see() == {(layer, e) for layer in range(2) for e in range(COUNT)}
    assert Traveller(filled, [1]).see() == {(1, e) for e in range(COUNT)}


def test_after_the_first_time_only_changes_are_told(bench: Make) -> None:  # noqa: F811
    b = bench([2, 2], 1)
    b.use(0, [0, 1])
    t = Traveller(b)
    assert t.see() == {(0, 0), (0, 1)}
    assert len(t.told) == 2 * COUNT
    t.see()
    assert t.told == []
    b.use(0, [2])  # for which the one that was used least recently leaves
    assert t.see() == {(0, 1), (0, 2)}
    assert {key for key, _ in t.told} == {(0, 0), (0, 2)}


def test_other_layers_are_not_told_of(filled: Bench) -> None:
    t = Traveller(filled, [0])
    t.see()
    filled.mover.table.upgrade(filled.mover.table.entries()[-1])
    assert filled.mover.table.entries()[-1].key.layer == 1
    t.see()
    assert t.told == []


def test_whoever_left_and_came_back_is_found_where_it_is_now(bench: Make) -> None:  # noqa: F811
    b = bench([2], 1)
    b.use(0, [0, 1])
    t = Traveller(b, [0])
    t.see()
    before = t.slots[ExpertKey(0, 0)]
    for experts in ([2, 3], [1], [0]):
        b.use(0, experts)
    assert t.see() == {(0, 0), (0, 1)}
    assert t.slots[ExpertKey(0, 0)] != before


def test_a_guess_that_nobody_has_asked_for_is_not_passed(bench: Make) -> None:  # noqa: F811
    b = bench([1, 1], 2)
    b.use(0, [0], guess(1, 2))
    b.settle()
    t = Traveller(b)
    assert t.see() == {(0, 0)}
    b.use(1, [2])
    assert t.see() == {(0, 0), (1, 2)}


def test_a_head_is_not_passed(filled: Bench) -> None:
    entry = filled.mover.table.get(ExpertKey(0, 1))
    assert entry is not None
    t = Traveller(filled, [0])
    t.see()
    filled.mover.table.upgrade(entry)  # its rest is on its way
    assert t.see() == {(0, 0), (0, 2)}
    filled.mover.table.landed(entry)
    assert t.see() == {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize("leased", [True, False])
def test_what_was_passed_is_booked_as_leases_book_it(leased: bool, bench: Make) -> None:  # noqa: F811
    b = bench([2, 2], 1)
    for layer in (0, 1):
        b.use(layer, [0, 1])
    b.mover.reset()
    t = Traveller(b)
    if leased:
        b.use(0, [0])
        b.use(1, [1])
    else:
        t.open()
        t.passing.close([passed(0, 0), passed(1, 1)])
        assert t.learned == [(0, [0]), (1, [1])]
    counts = b.mover.telemetry.counts[Phase.DECODE]
    assert [(c.requests, c.hits, c.misses) for c in counts] == [(1, 1, 0)] * 2
    b.use(0, [2])
    b.use(1, [2])
    assert t.see() == {(0, 0), (0, 2), (1, 1), (1, 2)}  # what was asked for last has stayed


def test_what_was_passed_took_its_time(filled: Bench) -> None:
    t = Traveller(filled)
    t.open()
    t.passing.close([passed(0, 1, at=5.0, took=0.25), passed(1, 1, at=7.0, took=0.5)])
    telemetry = filled.mover.telemetry
    assert telemetry.leases[Phase.DECODE].lease_s == 0.75
    assert telemetry.leases[Phase.DECODE].stall_s == 0
    assert filled.mover.turns.compute_s[Phase.DECODE].value == pytest.approx(2.0)


def test_a_token_that_passes_is_a_step_to_the_levels_of_guessing(bench: Make) -> None:  # noqa: F811
    b = bench([COUNT, COUNT], 1, None)
    preload(b)
    steps: list[float] = []
    b.mover.benefit.end_step = steps.append  # type: ignore[method-assign]
    t = Traveller(b)
    t.open()
    t.passing.close([passed(0, 1, at=5.0), passed(1, 1, at=7.0)])
    assert steps == [2.0]


def test_nothing_is_booked_where_nothing_was_passed(filled: Bench) -> None:
    t = Traveller(filled)
    t.see()
    assert t.learned == []
    assert filled.mover.telemetry.total().requests == 0
    filled.use(1, [0])  # the next lease finds nobody in its way


def test_an_interrupt_while_booking_lets_go(filled: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    t = Traveller(filled)
    t.open()
    monkeypatch.setattr(filled.mover.telemetry, "counts", None)
    with pytest.raises(TypeError):
        t.passing.close([passed(0, 1)])
    monkeypatch.undo()
    other = threading.Thread(target=filled.use, args=(0, [0]), daemon=True)
    other.start()  # its lease begins, from an empty table
    other.join(5)
    assert not other.is_alive()
    assert filled.mover.telemetry.total().misses == 1


def test_an_interrupt_while_being_told_tells_all_again(filled: Bench) -> None:
    t = Traveller(filled)
    t.see()
    filled.mover.table.upgrade(filled.mover.table.entries()[0])

    def torn(moved: list[Place]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        t.passing.open(torn)
    assert t.see() == set()  # an empty table, and nobody is believed to be where it was
    filled.use(0, [2])
    assert t.see() == {(0, 2)}


def test_a_lease_waits_until_all_are_let_go(filled: Bench) -> None:
    t = Traveller(filled)
    t.open()
    done = threading.Event()

    def other() -> None:
        filled.use(0, [1])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.1)
    t.passing.close([passed(0, 1)])
    assert done.wait(5)
    thread.join()


def test_a_prompt_of_another_thread_borrows_nobody_that_is_passed(bench: Make) -> None:  # noqa: F811
    b = bench([COUNT, COUNT, COUNT], 1)
    preload(b, layers=3)
    with b.mover.lease(Choice(2, [0], 8, [8])) as arriving:
        list(arriving)  # the turn that is on is a prompt's
    t = Traveller(b, [0, 1, 2])
    there = t.open()
    b.mover.speculate(guess(0, 5, 6, 7))
    b.settle()
    assert {(e.key.layer, e.key.expert) for e in b.mover.table.entries() if not e.spare} == there
    for (layer, expert), slot in t.slots.items():
        assert set(b.view(slot)) == {10 * layer + expert}
    t.passing.close([])
    b.mover.speculate(guess(1, 5, 6, 7))  # now it does
    assert b.mover.table.spare_slots > 1
    b.mover.table.check()


def test_the_level_of_guessing_is_the_movers(bench: Make) -> None:  # noqa: F811
    assert Traveller(bench([2], 1, 4)).passing.guess_level() == 0  # one level: none
    b = bench([2], 1, None)
    b.mover.benefit.levels, b.mover.benefit.level = 2, 1
    t = Traveller(b)
    assert t.passing.guess_level() == 1
    b.mover.benefit.level = 0
    assert t.passing.guess_level() == 0
