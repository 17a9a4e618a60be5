"""The mover fills slots, counts honestly, and survives failures."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import pytest

from fate_moe.cache import ExpertTable, make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.errors import CacheError, ReadError
from fate_moe.prefetch.mover import Mover
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests.fakes import FakeReader

RECORD = 4096


class Bench:
    """A mover over plain memory; slots can be looked at."""

    def __init__(self, capacities: Sequence[int], spare: int, window: int | None = 99) -> None:
        self.reader = FakeReader()
        self.memory = bytearray(RECORD * (sum(capacities) + spare))
        table = ExpertTable(Regions.per_layer(capacities), spare, lambda c: make_cache("lru", c))
        self.mover = Mover(
            table, self.reader, self, [RECORD] * len(capacities), io_threads=2, window=window
        )

    def view(self, slot: int) -> memoryview:
        return memoryview(self.memory)[slot * RECORD : (slot + 1) * RECORD]

    def used(self, slots: Sequence[int]) -> None:
        """Plain memory has been read when it has been read."""

    def use(self, layer: int, experts: Sequence[int], guess: Prediction | None = None) -> list[int]:
        """Run one layer's turn; check every slot's bytes; return the order of arrival."""
        order = []
        with self.mover.lease(Choice(layer, experts)) as arriving:
            self.mover.speculate(guess)
            for expert, slot, _ in chain.from_iterable(arriving):
                assert set(self.view(slot)) == {10 * layer + expert}
                order.append(expert)
        self.mover.table.check()
        return order

    def settle(self) -> None:
        """Wait until no read is queued or in flight."""
        deadline = time.monotonic() + 5
        while any(not e.resident for e in self.mover.table.entries()):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: object, **kwargs: object) -> Bench:
        made.append(Bench(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.reader.gate.set()
        one.mover.close()


def guess(layer: int, *experts: int) -> Prediction:
    return Prediction(layer, experts, len(experts))


def test_a_miss_is_read_and_then_hits(bench: Callable[..., Bench]) -> None:
    b = bench([2], 1)
    assert sorted(b.use(0, [3, 5])) == [3, 5]
    assert b.use(0, [5, 3]) == [5, 3]
    counts = b.mover.telemetry.total()
    assert (counts.requests, counts.hits, counts.late, counts.misses) == (4, 2, 0, 2)
    assert b.mover.telemetry.bytes_demand == 2 * RECORD
    assert sorted(b.reader.reads) == [(0, 3), (0, 5)]


def test_residents_come_before_what_must_be_read(bench: Callable[..., Bench]) -> None:
    b = bench([3], 0)
    b.use(0, [7])
    assert b.use(0, [1, 7])[0] == 7


@pytest.mark.parametrize(("capacities", "spare"), [([1], 0), ([0], 1), ([0], 2), ([1], 1)])
def test_fewer_slots_than_experts_still_serve_them_all(
    bench: Callable[..., Bench], capacities: list[int], spare: int
) -> None:
    b = bench(capacities, spare)
    for _ in range(3):
        assert sorted(b.use(0, [0, 1, 2, 3, 4])) == [0, 1, 2, 3, 4]
    assert b.mover.telemetry.total().requests == 15


def test_a_good_guess_turns_a_miss_into_a_hit(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 2)
    b.use(0, [0], guess(1, 4, 5))
    b.settle()
    b.use(1, [4])
    counts = b.mover.telemetry.total(layer=1)
    assert (counts.hits, counts.misses, counts.saved) == (1, 0, 1)
    assert (counts.recall_of, counts.recall_hit) == (1, 1)
    t = b.mover.telemetry
    assert (t.guesses, t.guesses_used, t.bytes_speculated) == (2, 1, 2 * RECORD)


def test_a_guess_in_flight_counts_as_late(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 2)
    b.use(0, [0])
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 4))
    lease = b.mover.lease(Choice(1, [4]))
    b.reader.gate.set()
    with lease as arriving:
        assert [expert for expert, *_ in chain.from_iterable(arriving)] == [4]
    counts = b.mover.telemetry.total(layer=1)
    assert (counts.hits, counts.late, counts.misses) == (0, 1, 0)


def test_a_read_that_had_to_wait_for_a_slot_wakes_the_readers(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_moe.prefetch.lease.POLL_S", 2.0)
    b = bench([0, 0], 1)
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 4))
    time.sleep(0.05)  # a reader holds the only slot now
    lease = b.mover.lease(Choice(0, [3]))
    b.reader.gate.set()
    b.settle()
    time.sleep(0.05)  # the slot can be had, and both readers sleep
    with lease as arriving:
        assert [expert for expert, *_ in chain.from_iterable(arriving)] == [3]


def test_stale_guesses_are_cancelled_before_they_cost_a_byte(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 6)
    b.use(0, [0])
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 1, 2, 3, 4, 5))
    time.sleep(0.05)  # both readers hold one guess each now
    lease = b.mover.lease(Choice(1, [5]))
    b.reader.gate.set()
    with lease as arriving:
        assert [expert for expert, *_ in chain.from_iterable(arriving)] == [5]
    b.settle()
    assert {k.expert for k in b.reader.reads if k.layer == 1} == {1, 2, 5}
    t = b.mover.telemetry
    assert (t.guesses, t.bytes_speculated) == (3, 3 * RECORD)


def test_a_guess_never_evicts_what_the_router_chose(bench: Callable[..., Bench]) -> None:
    b = bench([2, 2], 1)
    b.use(0, [0, 1])
    b.use(1, [0, 1])
    for expert in (2, 3, 4, 5):
        b.mover.speculate(guess(1, expert))
        b.settle()
    b.use(0, [0, 1])
    b.use(1, [0, 1])
    assert b.mover.telemetry.total().misses == 4


def test_unused_guesses_are_wasted_bytes(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1, 1], 1)
    b.use(0, [0], guess(1, 3))
    b.settle()
    b.use(1, [5], guess(2, 3))
    b.settle()
    assert b.mover.telemetry.bytes_wasted == RECORD


def test_guesses_without_a_slot_are_tried_again_as_slots_come_free(
    bench: Callable[..., Bench],
) -> None:
    b = bench([0, 0], 2)
    b.use(0, [1, 2], guess(1, 7, 8))  # both spare slots are leased when the guess is made
    b.settle()
    b.use(1, [7, 8])
    counts = b.mover.telemetry.total(layer=1)
    assert (counts.hits, counts.misses) == (2, 0)


def test_the_window_caps_the_guesses_of_a_layer(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 4, window=1)
    b.use(0, [0], guess(1, 1, 2, 3))
    assert b.mover.telemetry.guesses == 1
    closed = bench([1, 1], 4, window=0)
    closed.use(0, [0], guess(1, 1, 2, 3))
    assert closed.mover.telemetry.guesses == 0


def test_a_prompts_guesses_borrow_slots_until_it_is_read(bench: Callable[..., Bench]) -> None:
    b = bench([4, 4, 4], 1)
    everyone = Prediction(1, (0, 1, 2, 3), 4)
    b.use(0, [0])
    with b.mover.lease(Choice(0, [0, 1], 8)) as arriving:
        b.mover.speculate(everyone)
        list(chain.from_iterable(arriving))
    b.settle()
    assert b.mover.telemetry.guesses == 3  # layer 2 lends half of its slots
    b.use(1, [0])
    b.settle()
    assert b.mover.table.spare_slots == 1
    b.mover.speculate(Prediction(2, (0, 1, 2, 3), 4))
    assert b.mover.telemetry.guesses == 4


def test_no_more_slots_are_lent_than_there_are_guesses(bench: Callable[..., Bench]) -> None:
    b = bench([4, 4, 4], 1)
    with b.mover.lease(Choice(0, [0, 1], 8)) as arriving:
        b.mover.speculate(Prediction(1, (0, 1), 2))
        list(chain.from_iterable(arriving))
    assert b.mover.table.spare_slots == 2


def test_a_failed_read_fails_its_request_only(bench: Callable[..., Bench]) -> None:
    b = bench([2], 1)
    b.use(0, [0])
    b.reader.fail = lambda key: key.expert == 3
    with pytest.raises(ReadError, match=r"layer 0, expert 3: fake at offset 12288.*errno 5"):
        b.use(0, [0, 3, 4, 5])
    b.reader.fail = lambda key: False
    assert sorted(b.use(0, [3, 4])) == [3, 4]
    assert all(e.locks == 0 for e in b.mover.table.entries())


def test_a_failed_guess_is_forgotten(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 1)
    b.reader.fail = lambda key: key.layer == 1
    b.use(0, [0], guess(1, 3))
    b.settle()
    b.reader.fail = lambda key: False
    assert b.use(1, [3]) == [3]


def test_an_error_inside_the_lease_releases_every_lock(bench: Callable[..., Bench]) -> None:
    b = bench([2], 1)

    def fail_at_the_first(experts: list[int]) -> None:
        with b.mover.lease(Choice(0, experts)) as arriving:
            for _ in arriving:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_at_the_first([1, 2, 3])
    b.settle()
    assert all(e.locks == 0 for e in b.mover.table.entries())
    assert sorted(b.use(0, [1, 2, 3])) == [1, 2, 3]


def test_preload_fills_regions_and_counts_apart(bench: Callable[..., Bench]) -> None:
    b = bench([2, 1], 1)
    ticks: list[int] = []
    b.mover.preload([ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2)], ticks.append)
    assert ticks[-1] == 2
    assert b.use(0, [0, 1]) == [0, 1]
    assert b.mover.telemetry.total().hits == 2
    assert b.mover.telemetry.bytes_preloaded == 2 * RECORD
    assert b.mover.telemetry.bytes_demand == 0


def test_preload_reports_a_failed_read(bench: Callable[..., Bench]) -> None:
    b = bench([2], 0)
    b.reader.fail = lambda key: key.expert == 1
    with pytest.raises(ReadError, match="expert 1"):
        b.mover.preload([ExpertKey(0, 0), ExpertKey(0, 1)], lambda done: None)


def test_decode_gets_what_has_landed_together_and_prefill_one_by_one(
    bench: Callable[..., Bench],
) -> None:
    b = bench([4], 0)
    b.use(0, [0, 1, 2, 3])
    for phase, sizes in ((Phase.DECODE, [4]), (Phase.PREFILL, [1, 1, 1, 1])):
        with b.mover.lease(Choice(0, [0, 1, 2, 3], 1 if phase is Phase.DECODE else 2)) as arriving:
            assert [len(landed) for landed in arriving] == sizes
    b.mover.table.check()
    assert all(entry.locks == 0 for entry in b.mover.table.entries())


def test_waiting_is_booked_as_stall(bench: Callable[..., Bench]) -> None:
    b = bench([1], 1)
    b.reader.gate.clear()
    lease = b.mover.lease(Choice(0, [1]))
    threading.Timer(0.05, b.reader.gate.set).start()
    with lease as arriving:
        list(arriving)
    assert b.mover.telemetry.stall_s >= 0.04
    before = b.mover.telemetry.stall_s
    b.use(0, [1])
    assert b.mover.telemetry.stall_s == before


def test_a_closed_mover_says_so(bench: Callable[..., Bench]) -> None:
    b = bench([1], 1)
    b.mover.close()
    b.mover.close()
    with pytest.raises(CacheError, match="closed"):
        b.mover.lease(Choice(0, [1]))


def test_two_threads_take_turns(bench: Callable[..., Bench]) -> None:
    b = bench([1, 0], 2)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40):
                b.use(0, [0, 1, 2, 3], guess(1, 4, 5))
                b.use(1, [4, 5, 6])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert b.mover.telemetry.total().requests == 3 * 40 * 7
    b.mover.table.check()


def test_a_failure_of_an_ended_lease_does_not_fail_the_next(bench: Callable[..., Bench]) -> None:
    b = bench([2, 2], 2)
    b.reader.fail = lambda key: key.expert in (3, 4)
    with pytest.raises(ReadError):
        b.use(1, [3, 4])
    b.settle()
    b.reader.fail = lambda key: False
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 3, 4))
    lease = b.mover.lease(Choice(1, [3, 4]))
    b.reader.gate.set()
    with lease as arriving:
        assert sorted(expert for expert, *_ in chain.from_iterable(arriving)) == [3, 4]
    assert all(entry.locks == 0 for entry in b.mover.table.entries())


class Interrupted(BaseException):
    """Stands for Ctrl-C, which may strike between any two steps."""


@pytest.mark.parametrize("where", ["landed", "unlock", "place_demand", "touch", "get", "drop"])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_an_interrupt_anywhere_costs_only_time(
    bench: Callable[..., Bench], where: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench([2, 1], 2)
    b.use(0, [0, 1, 2])
    table, real, calls = b.mover.table, getattr(b.mover.table, where), iter(range(1, 999))
    main = threading.get_ident()

    def struck(*arguments: object) -> object:
        result = real(*arguments)
        if threading.get_ident() == main and next(calls) == nth:
            raise Interrupted
        return result

    monkeypatch.setattr(table, where, struck)
    try:
        for _ in range(3):
            b.use(0, [3, 4, 0, 5], guess(1, 1, 2))
            b.use(1, [1, 3])
    except Interrupted:
        pass
    monkeypatch.setattr(table, where, real)
    for _ in range(2):
        assert sorted(b.use(0, [1, 2, 3, 4])) == [1, 2, 3, 4]
        assert sorted(b.use(1, [1, 2, 5])) == [1, 2, 5]
    assert all(entry.locks == 0 for entry in b.mover.table.entries())


def test_an_interrupt_before_the_lease_is_entered(bench: Callable[..., Bench]) -> None:
    b = bench([2], 1)
    b.mover.lease(Choice(0, [1, 2]))  # and then Ctrl-C: never entered, never ended
    assert sorted(b.use(0, [1, 2, 3])) == [1, 2, 3]


def test_counts_start_at_zero_after_a_reset(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 4)
    b.use(0, [0], guess(1, 4, 5))
    b.settle()
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 6, 7))
    b.mover.reset()
    b.reader.gate.set()
    b.use(1, [4, 6])
    t = b.mover.telemetry
    assert (t.guesses, t.guesses_used, t.bytes_speculated) == (0, 0, 0)
    assert t.total().saved == 0
    assert t.bytes_wasted == 0


def test_a_pause_between_steps_opens_no_window(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 9, window=None)
    for _ in range(3):
        b.use(0, [0])
        b.use(1, [0])
    time.sleep(0.3)
    b.use(0, [0])
    longest = b.mover.turns.compute_s[Phase.DECODE].value
    assert longest is not None
    assert longest < 0.1


def test_a_withdrawn_demand_costs_no_bytes(bench: Callable[..., Bench]) -> None:
    b = bench([6], 0)
    b.reader.fail = lambda key: key.expert == 1
    b.reader.gate.clear()
    lease = b.mover.lease(Choice(0, [1, 2, 3, 4, 5]))
    b.reader.gate.set()

    def run() -> None:
        with lease as arriving:
            list(arriving)

    with pytest.raises(ReadError):
        run()
    b.settle()
    assert b.mover.telemetry.bytes_demand == len(b.reader.reads) * RECORD


def test_a_second_guess_takes_the_first_ones_place(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 6)
    b.use(0, [0])
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 4, 5, 6, 7))
    deadline = time.monotonic() + 5
    while b.mover._readers.reading < 2:  # both readers have begun, two reads wait
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert b.mover.telemetry.guesses == 4
    b.mover.speculate(guess(1, 8, 5))
    experts = {e.key.expert for e in b.mover.table.entries() if e.key.layer == 1}
    assert experts == {4, 5, 8}  # what readers have begun is read to its end
    assert b.mover.telemetry.guesses == 3
    b.reader.gate.set()
    b.settle()
    b.use(1, [5, 8])
    counts = b.mover.telemetry.total(layer=1)
    assert (counts.hits, counts.misses, counts.recall_hit) == (2, 0, 2)


def test_a_second_guess_has_what_the_first_left_of_the_window(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 6, window=3)
    b.use(0, [0])
    b.mover.speculate(guess(1, 4, 5))
    b.settle()
    b.mover.speculate(guess(1, 4, 5, 6, 7))
    assert b.mover.telemetry.guesses == 3
    # The next layer's first guess has the whole window again.
    b.settle()
    b.use(1, [4])
    b.mover.speculate(guess(0, 1, 2, 3, 4))
    assert b.mover.telemetry.guesses == 6


def test_how_much_is_guessed_follows_what_pays(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 2)
    free = Mover(
        b.mover.table, b.reader, b, [RECORD] * 2, io_threads=1, window=None, guess_levels=3
    )
    try:
        levels = set()
        for _ in range(40):
            levels.add(free.guess_level(1))
            assert free.guess_level(7) == 2  # a prompt
            for layer in (0, 1):
                with free.lease(Choice(layer, [0])) as arriving:
                    list(arriving)
        assert levels == {0, 1, 2}
    finally:
        free.close()
    fixed = Mover(b.mover.table, b.reader, b, [RECORD] * 2, io_threads=1, window=5, guess_levels=3)
    try:
        for _ in range(40):
            assert fixed.guess_level(1) == 2
            for layer in (0, 1):
                with fixed.lease(Choice(layer, [0])) as arriving:
                    list(arriving)
        assert fixed.benefit.describe().startswith("on, twice per layer; not asked")
    finally:
        fixed.close()


def test_what_a_second_guess_drops_it_may_read_in_its_place(bench: Callable[..., Bench]) -> None:
    b = bench([1, 1], 6, window=3)
    b.use(0, [0])
    b.reader.gate.clear()
    b.mover.speculate(guess(1, 4, 5, 6, 7))
    deadline = time.monotonic() + 5
    while b.mover._readers.reading < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    b.mover.speculate(guess(1, 8, 9))  # 6 was queued and goes: there is room for one
    experts = {e.key.expert for e in b.mover.table.entries() if e.key.layer == 1}
    assert experts == {4, 5, 8}
    b.reader.gate.set()
    b.settle()
