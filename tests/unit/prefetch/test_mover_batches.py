"""Small records are read several at once: same bytes, same counts, each with its own failure."""

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain

import pytest

from fate_moe.cache import ExpertTable, make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.errors import CacheError, ReadError
from fate_moe.prefetch.mover import Mover
from fate_moe.store.reader import BatchReader, Mode, Request
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests.fakes import FakeReader

RECORD = 4096


class FakeBatchReader(FakeReader):
    """A FakeReader that takes several requests; remembers them and on which thread they came."""

    mode: Mode = "buffered"
    batch_bytes = 3 * RECORD

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[ExpertKey]] = []
        self.readers: dict[ExpertKey, threading.Thread] = {}

    def record_bytes(self, layer: int) -> int:
        return RECORD

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        self.readers[key] = threading.current_thread()
        super().read_into(key, buffer)

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        self.gate.wait(10)
        self.batches.append([request.key for request in requests])
        outcomes: list[ReadError | None] = []
        for request in requests:
            try:
                self.read_into(request.key, request.buffer)
                outcomes.append(None)
            except ReadError as error:
                outcomes.append(error)
        return outcomes

    def close(self) -> None: ...


class Bench:
    def __init__(
        self, capacities: Sequence[int], spare: int, reader: FakeBatchReader | None = None
    ) -> None:
        self.reader = reader or FakeBatchReader()
        assert isinstance(self.reader, BatchReader)
        self.memory = bytearray(RECORD * (sum(capacities) + spare))
        table = ExpertTable(Regions.per_layer(capacities), spare, lambda c: make_cache("lru", c))
        self.mover = Mover(
            table, self.reader, self, [RECORD] * len(capacities), io_threads=2, window=99
        )

    def view(self, slot: int) -> memoryview:
        return memoryview(self.memory)[slot * RECORD : (slot + 1) * RECORD]

    def used(self, slots: Sequence[int]) -> None:
        """Plain memory has been read when it has been read."""

    def use(
        self,
        layer: int,
        experts: Sequence[int],
        guess: Prediction | None = None,
        phase: Phase = Phase.DECODE,
    ) -> list[list[int]]:
        """Run one layer's turn; check every slot's bytes; return what was handed over at once."""
        pieces = []
        with self.mover.lease(
            Choice(layer, experts, 1 if phase is Phase.DECODE else 2)
        ) as arriving:
            self.mover.speculate(guess)
            for piece in arriving:
                for expert, slot, _ in piece:
                    assert set(self.view(slot)) == {10 * layer + expert}
                pieces.append([expert for expert, *_ in piece])
        with self.mover.section:  # other threads may be changing it
            self.mover.table.check()
        return pieces

    def settle(self) -> None:
        deadline = time.monotonic() + 5
        while any(not e.resident for e in self.mover.table.entries()):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench([4, 4], 4)
    yield made
    made.reader.gate.set()
    made.mover.close()


def guess(layer: int, *experts: int) -> Prediction:
    return Prediction(layer, experts, len(experts))


def test_the_misses_of_a_token_are_read_at_once_by_whoever_waits(bench: Bench) -> None:
    bench.use(0, [5])
    assert bench.use(0, [1, 5, 2, 3]) == [[5], [1, 2, 3]]
    assert bench.reader.batches == [[(0, 1), (0, 2), (0, 3)]]
    assert set(bench.reader.readers.values()) == {threading.current_thread()}
    counts = bench.mover.telemetry.total()
    assert (counts.hits, counts.misses) == (1, 4)
    assert bench.mover.telemetry.stall_s > 0
    assert bench.mover.link.bytes == 4 * RECORD
    assert bench.mover.link.active == 0


def test_a_batch_is_no_larger_than_the_reader_likes(bench: Bench) -> None:
    bench.use(0, [1, 2, 3, 4])
    assert bench.reader.batches == [[(0, 1), (0, 2), (0, 3)]]
    assert sorted(bench.reader.reads) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_prefill_leaves_demands_to_the_reader_threads(bench: Bench) -> None:
    bench.use(0, [1, 2, 3, 4], phase=Phase.PREFILL)
    assert threading.current_thread() not in bench.reader.readers.values()


def test_guesses_are_read_at_once_by_a_reader_thread(bench: Bench) -> None:
    bench.use(0, [0])
    bench.reader.gate.clear()
    bench.mover.speculate(guess(1, 1, 2, 3))
    bench.reader.gate.set()
    bench.settle()
    assert threading.current_thread() not in [
        bench.reader.readers[ExpertKey(1, e)] for e in (1, 2, 3)
    ]
    assert bench.use(1, [3, 1]) == [[3, 1]]


def test_a_demand_does_not_wait_for_the_guesses(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2))
    bench.use(1, [3, 4])
    for batch in bench.reader.batches:
        assert len({key.expert in (3, 4) for key in batch}) == 1


def test_a_failed_read_fails_its_request_and_not_its_batch(bench: Bench) -> None:
    bench.reader.fail = lambda key: key.expert == 2
    with pytest.raises(ReadError, match="expert 2"):
        bench.use(0, [1, 2, 3])
    table = bench.mover.table
    assert [table.get(ExpertKey(0, e)) is not None for e in (1, 2, 3)] == [True, False, True]
    bench.reader.fail = lambda key: False
    assert bench.use(0, [1, 2, 3]) == [[1, 3], [2]]
    assert all(entry.locks == 0 for entry in table.entries())


def test_a_batch_that_breaks_fails_all_of_it(bench: Bench) -> None:
    def broken(requests: Sequence[Request]) -> list[ReadError | None]:
        raise ValueError("a fault of the reader")

    bench.reader.read_many = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a fault of the reader"):
        bench.use(0, [1, 2])
    del bench.reader.read_many
    assert bench.use(0, [1, 2]) == [[1, 2]]


def test_a_closed_engine_ends_while_guesses_are_under_way(bench: Bench) -> None:
    bench.use(0, [0])
    bench.reader.gate.clear()
    bench.mover.speculate(guess(1, 1, 2, 3))
    threading.Timer(0.05, bench.reader.gate.set).start()
    bench.mover.close()
    with pytest.raises(CacheError, match="closed"):
        bench.mover.lease(Choice(1, [1]))


class Interrupted(BaseException):
    """Stands for Ctrl-C, which may strike between any two steps."""


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_interrupt_while_reading_costs_only_time(
    bench: Bench, where: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_moe.prefetch.mover.POLL_S", 2.0)
    real, calls, main = bench.reader.read_many, iter(range(1, 99)), threading.current_thread()

    def struck(requests: Sequence[Request]) -> list[ReadError | None]:
        strike = threading.current_thread() is main and next(calls) == nth
        if strike and where == "before":
            raise Interrupted
        outcomes = real(requests)
        if strike:
            raise Interrupted
        return outcomes

    bench.reader.read_many = struck  # type: ignore[method-assign]

    def run() -> None:
        for experts in ([1, 2, 3], [4, 5, 6], [1, 2, 3]):
            bench.use(0, experts, guess(1, 1, 2))

    with pytest.raises(Interrupted):
        run()
    del bench.reader.read_many
    began = time.monotonic()
    for _ in range(2):
        assert sorted(chain.from_iterable(bench.use(0, [1, 2, 3, 7]))) == [1, 2, 3, 7]
        assert sorted(chain.from_iterable(bench.use(1, [1, 2, 5]))) == [1, 2, 5]
    assert time.monotonic() - began < 1.5
    assert all(entry.locks == 0 for entry in bench.mover.table.entries())
    assert bench.mover.link.active == 0


def test_two_threads_take_turns(bench: Bench) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40):
                bench.use(0, [0, 1, 2, 3, 4], guess(1, 4, 5))
                bench.use(1, [4, 5, 6])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert bench.mover.telemetry.total().requests == 3 * 40 * 8
    bench.mover.table.check()
