"""Does work done side by side come back in order, few pieces at a time, and stop when told to?"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fate_moe.errors import ConfigError
from fate_moe.store import ordered
from fate_moe.store.ordered import check_jobs, default_jobs, in_order

JOBS = [1, 2, 5]


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fate-convert")]


@pytest.mark.parametrize("jobs", JOBS)
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    def make(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(in_order(make, range(20), jobs)) == [item * item for item in range(20)]
    assert list(in_order(make, [], jobs)) == []
    assert workers() == []


def test_work_is_done_side_by_side() -> None:
    meet = threading.Barrier(3)
    assert list(in_order(lambda item: meet.wait(timeout=20) >= 0, range(6), 3)) == [True] * 6


@pytest.mark.parametrize("jobs", JOBS)
def test_never_more_than_a_few_pieces(jobs: int) -> None:
    lock = threading.Lock()
    asked = handed = working = 0
    most_open = most_working = 0

    def items() -> Iterator[int]:
        nonlocal asked, most_open
        for item in range(30):
            asked += 1
            most_open = max(most_open, asked - handed)
            yield item

    def make(item: int) -> int:
        nonlocal working, most_working
        with lock:
            working += 1
            most_working = max(most_working, working)
        time.sleep(0.002)
        with lock:
            working -= 1
        return item

    for _ in in_order(make, items(), jobs):
        handed += 1
        time.sleep(0.003)  # a slow taker must not make the makers run ahead
    assert most_open == jobs + 1
    assert most_working <= jobs


@pytest.mark.parametrize("jobs", JOBS)
def test_the_first_failure_in_order_is_the_one_that_is_raised(jobs: int) -> None:
    begun: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        if item == 4:
            time.sleep(0.02)  # the later failure comes first
        if item >= 4:
            raise ValueError(f"item {item}")
        return item

    results = in_order(make, range(1000), jobs)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(results)
    assert max(begun) <= 4 + jobs
    assert workers() == []


def test_closing_drops_what_is_not_begun_and_waits_for_the_rest() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        time.sleep(0.02)
        ended.append(item)
        return item

    results = in_order(make, range(1000), 2)
    assert next(results) == 0
    results.close()
    assert sorted(begun) == sorted(ended)
    assert len(begun) <= 4
    assert workers() == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals work differently there")
def test_an_interrupt_while_waiting_begins_nothing_more() -> None:
    begun: list[int] = []
    is_asked = threading.Event()

    def make(item: int) -> int:
        begun.append(item)
        if item == 3:
            is_asked.wait(timeout=20)
            time.sleep(0.2)  # now the caller waits for us
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return item

    results = in_order(make, range(1000), 1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    is_asked.set()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert begun == [0, 1, 2, 3]
    assert workers() == []


@pytest.mark.parametrize("jobs", [0, -1, 257, 10**12])
def test_numbers_of_jobs_that_cannot_be(jobs: int) -> None:
    with pytest.raises(ConfigError, match=f"jobs: have {jobs}, need 1 to 256"):
        check_jobs(jobs)


def test_the_default_is_one_per_core_within_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    check_jobs(None)
    assert 1 <= default_jobs(1000) <= 256
    monkeypatch.setattr(ordered, "_usable_cores", lambda: 32)
    assert default_jobs(1000) == 32
    assert default_jobs(3 * 2048 * 1408) == 15  # an expert of Qwen1.5-MoE
    assert default_jobs(3 * 4096 * 14336) == 1  # of Mixtral 8x7B
    monkeypatch.setattr(ordered, "_usable_cores", lambda: 1000)
    assert default_jobs(1000) == 256
