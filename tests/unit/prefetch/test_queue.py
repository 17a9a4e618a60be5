"""Demands before guesses, nothing twice."""

from fate_moe.cache import Entry
from fate_moe.prefetch.queue import ReadQueue
from fate_moe.types import ExpertKey


def entry(expert: int, layer: int = 0) -> Entry:
    return Entry(ExpertKey(layer, expert), slot=expert)


def drain(queue: ReadQueue) -> list[int]:
    order = []
    while (item := queue.pop()) is not None:
        order.append(item.key.expert)
    return order


def test_demands_come_first_each_in_order() -> None:
    queue = ReadQueue()
    queue.push_guess(entry(1))
    queue.push_demand(entry(2))
    queue.push_guess(entry(3))
    queue.push_demand(entry(4))
    assert len(queue) == 4
    assert drain(queue) == [2, 4, 1, 3]


def test_a_promoted_guess_is_a_demand() -> None:
    queue = ReadQueue()
    queue.push_guess(entry(1))
    queue.push_guess(entry(2))
    queue.promote(ExpertKey(0, 2))
    queue.promote(ExpertKey(0, 9))
    assert drain(queue) == [2, 1]


def test_cancelled_guesses_are_handed_back() -> None:
    queue = ReadQueue()
    for expert in (1, 2, 3):
        queue.push_guess(entry(expert))
    gone = queue.cancel(lambda key: key.expert != 2)
    assert [e.key.expert for e in gone] == [1, 3]
    assert drain(queue) == [2]


def test_only_a_queued_demand_can_be_withdrawn() -> None:
    queue = ReadQueue()
    item = entry(1)
    queue.push_demand(item)
    assert queue.withdraw(ExpertKey(0, 1)) is item
    assert queue.withdraw(ExpertKey(0, 1)) is None
    assert queue.pop() is None
