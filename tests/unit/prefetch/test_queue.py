"""Demands before guesses, nothing twice."""

from fate_moe.cache import Entry
from fate_moe.prefetch.queue import ReadQueue
from fate_moe.types import ExpertKey


def entry(expert: int, layer: int = 0) -> Entry:
    return Entry(ExpertKey(layer, expert), slot=expert)


def drain(queue: ReadQueue) -> list[int]:
    order = []
    while batch := queue.take():
        order += [item.key.expert for item in batch]
    return order


def test_demands_come_first_each_in_order() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    queue.push_guess(entry(1))
    queue.push_demand(entry(2))
    queue.push_guess(entry(3))
    queue.push_demand(entry(4))
    assert len(queue) == 4
    assert drain(queue) == [2, 4, 1, 3]


def test_a_promoted_guess_is_a_demand() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    queue.push_guess(entry(1))
    queue.push_guess(entry(2))
    queue.promote(ExpertKey(0, 2))
    queue.promote(ExpertKey(0, 9))
    assert drain(queue) == [2, 1]


def test_cancelled_guesses_are_handed_back() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    for expert in (1, 2, 3):
        queue.push_guess(entry(expert))
    gone = queue.cancel(lambda key: key.expert != 2)
    assert [e.key.expert for e in gone] == [1, 3]
    assert drain(queue) == [2]


def test_only_a_queued_demand_can_be_withdrawn() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    item = entry(1)
    queue.push_demand(item)
    assert queue.withdraw(ExpertKey(0, 1)) is item
    assert queue.withdraw(ExpertKey(0, 1)) is None
    assert queue.take() == []


def test_small_reads_are_taken_together() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    for expert in (1, 2, 3):
        queue.push_demand(entry(expert))
    queue.push_demand(entry(4, layer=1))
    assert [e.key.expert for e in queue.take(20)] == [1, 2]
    assert [e.key.expert for e in queue.take(34)] == [3]
    assert [e.key.expert for e in queue.take(20)] == [4]
    assert queue.take(20) == []


def test_a_batch_holds_demands_or_guesses() -> None:
    queue = ReadQueue(lambda entry: (10, 25)[entry.key.layer])
    queue.push_guess(entry(1))
    queue.push_guess(entry(2))
    queue.push_demand(entry(3))
    assert [e.key.expert for e in queue.take(1000)] == [3]
    assert queue.take_demands(1000) == []
    assert [e.key.expert for e in queue.take(1000)] == [1, 2]
