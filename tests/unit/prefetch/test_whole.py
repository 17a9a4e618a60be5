"""All experts of some layers held at once: only where all are there, and one thread at a time."""

import threading
from collections.abc import Callable

import pytest

from fate_moe.prefetch.whole import Whole
from fate_moe.types import ExpertKey, Phase
from tests.unit.prefetch.test_mover import Bench, bench  # noqa: F401

COUNT = 3
Make = Callable[..., Bench]


def preload(b: Bench, layers: int = 2) -> None:
    keys = [ExpertKey(layer, expert) for layer in range(layers) for expert in range(COUNT)]
    b.mover.preload(keys, lambda done: None)


@pytest.fixture
def filled(bench: Make) -> Bench:  # noqa: F811
    b = bench([COUNT, COUNT], 1)
    preload(b)
    return b


def test_slots_are_those_of_the_experts(filled: Bench) -> None:
    whole = Whole(filled.mover, {0: COUNT, 1: COUNT})
    assert whole.open()
    for layer, slots in enumerate(whole.slots):
        assert [set(filled.view(slot)) for slot in slots] == [
            {10 * layer + expert} for expert in range(COUNT)
        ]
    whole.close(2)
    counts = filled.mover.telemetry.counts[Phase.DECODE]
    assert [(c.requests, c.hits, c.misses) for c in counts] == [(2, 2, 0)] * 2


def test_what_is_held_together_is_no_lease_of_the_layer_before(filled: Bench) -> None:
    filled.use(0, [0])
    leases = filled.mover.telemetry.leases[Phase.DECODE]
    before = leases.lease_s
    assert before > 0
    whole = Whole(filled.mover, {0: COUNT, 1: COUNT})
    assert whole.open()
    whole.close(2)
    assert leases.lease_s == before


def test_nothing_is_counted_where_nothing_was_computed(filled: Bench) -> None:
    whole = Whole(filled.mover, {1: COUNT})
    assert whole.open()
    whole.close(0)
    assert filled.mover.telemetry.total().requests == 0
    filled.use(1, [0])  # the next lease finds nobody in its way


def test_one_that_is_missing_is_enough_to_hold_nothing(bench: Make) -> None:  # noqa: F811
    b = bench([COUNT, COUNT], 1)
    preload(b, layers=1)
    assert Whole(b.mover, {0: COUNT}).open()
    b.mover.end_lease()
    whole = Whole(b.mover, {0: COUNT, 1: COUNT})
    assert not whole.open()
    b.use(1, [2])
    assert not whole.open()
    b.use(1, [0, 1])
    assert whole.open()
    whole.close(0)


def test_whoever_left_and_came_back_is_found_where_it_is_now(bench: Make) -> None:  # noqa: F811
    b = bench([2], 1)
    b.use(0, [0, 1])
    whole = Whole(b.mover, {0: 2})
    assert whole.open()
    before = whole.slots[0]
    whole.close(0)
    b.use(0, [2, 3])
    assert not whole.open()
    b.use(0, [1])
    b.use(0, [0])
    assert whole.open()
    assert whole.slots[0] != before
    assert [set(b.view(slot)) for slot in whole.slots[0]] == [{0}, {1}]
    whole.close(0)


def test_an_interrupt_while_counting_lets_go(
    filled: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(filled.mover, {0: COUNT})
    assert whole.open()
    monkeypatch.setattr(filled.mover.telemetry, "counts", None)
    with pytest.raises(TypeError):
        whole.close(1)
    monkeypatch.undo()
    other = threading.Thread(target=filled.use, args=(0, [0]), daemon=True)
    other.start()  # its lease begins, from an empty table
    other.join(5)
    assert not other.is_alive()
    assert filled.mover.telemetry.total().misses == 1


def test_a_lease_waits_until_all_are_let_go(filled: Bench) -> None:
    whole = Whole(filled.mover, {0: COUNT, 1: COUNT})
    assert whole.open()
    done = threading.Event()

    def other() -> None:
        filled.use(0, [1])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.1)
    whole.close(1)
    assert done.wait(5)
    thread.join()


def test_after_an_interrupt_nothing_is_held(filled: Bench) -> None:
    whole = Whole(filled.mover, {0: COUNT})
    assert whole.open()
    whole.close(1)
    filled.mover.section.torn = True
    assert not whole.open()
    filled.use(0, [0, 1, 2])
    assert whole.open()
    whole.close(1)
