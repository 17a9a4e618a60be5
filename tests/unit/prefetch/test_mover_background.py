"""Small records come in by themselves in decode: same bytes, same counts, nothing left behind."""

from collections.abc import Iterator, Sequence
from itertools import chain

import pytest

from fate_moe.errors import CacheError, ReadError
from fate_moe.store.background import Landed
from fate_moe.store.reader import BackgroundReader, Request
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests.unit.prefetch import test_mover_batches
from tests.unit.prefetch.test_mover_batches import RECORD, FakeBatchReader, guess


class FakeBackgroundReader(FakeBatchReader):
    """Begins `at_once` reads in the background at a time, which land when somebody waits for them.

    What has not begun can be withdrawn.
    """

    any_size = False

    def promote(self, key: ExpertKey) -> None:
        """Each waits for its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = 2
        self.waiting: list[Request] = []
        self.begun: list[Request] = []
        self.through: list[Landed] = []
        self.withdrawn: list[ExpertKey] = []
        self.forgotten = 0

    def start(self, requests: Sequence[Request]) -> None:
        self.waiting.extend(requests)
        self._begin()

    def withdraw(self, key: ExpertKey) -> bool:
        for request in self.waiting:
            if request.key == key:
                self.waiting.remove(request)
                self.withdrawn.append(key)
                return True
        return False

    def landed(self) -> list[Landed]:
        found, self.through = self.through, []
        return found

    def wait(self, most_s: float) -> bool:
        if not self.through:
            self.land()
        return bool(self.through)

    def forget(self) -> None:
        self.forgotten += 1
        self.waiting, self.begun, self.through = [], [], []

    def land(self) -> None:
        for request, failure in zip(self.begun, self.read_many(self.begun), strict=True):
            self.through.append(Landed(request.key, failure, 0.001))
        self.begun = []
        self._begin()

    def _begin(self) -> None:
        while self.waiting and len(self.begun) < self.at_once:
            self.begun.append(self.waiting.pop(0))


class Bench(test_mover_batches.Bench):
    reader: FakeBackgroundReader

    def __init__(self, capacities: Sequence[int], spare: int) -> None:
        super().__init__(capacities, spare, FakeBackgroundReader())
        assert isinstance(self.reader, BackgroundReader)

    def use(
        self,
        layer: int,
        experts: Sequence[int],
        guess: Prediction | None = None,
        phase: Phase = Phase.DECODE,
    ) -> list[list[int]]:
        pieces = super().use(layer, experts, guess, phase)
        assert all(entry.locks == 0 for entry in self.mover.table.entries())
        return pieces

    def has(self, layer: int, expert: int) -> bool:
        return self.mover.table.get(ExpertKey(layer, expert)) is not None


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench([4, 4], 4)
    yield made
    made.mover.close()


def test_misses_come_in_by_themselves_while_residents_compute(bench: Bench) -> None:
    bench.use(0, [5])
    reads = []
    with bench.mover.lease(Choice(0, [1, 2, 3, 5], 1)) as arriving:
        pieces = iter(arriving)
        assert [expert for expert, *_ in next(pieces)] == [5]
        reads = [request.key.expert for request in bench.reader.begun + bench.reader.waiting]
        assert [[expert for expert, *_ in piece] for piece in pieces] == [[1, 2], [3]]
    assert reads == [1, 2, 3]
    link = bench.mover.link
    assert (link.active, link.bytes) == (0, 4 * RECORD)
    assert bench.mover.telemetry.bytes_demand == 4 * RECORD


def test_a_guess_that_landed_is_a_hit(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2))
    bench.reader.land()
    assert bench.use(1, [1, 2]) == [[1, 2]]
    counts = bench.mover.telemetry.total(Phase.DECODE, 1)
    assert (counts.hits, counts.late, counts.misses, counts.saved) == (2, 0, 0, 2)


def test_a_guess_on_its_way_is_late_and_read_once(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3))
    assert bench.use(1, [1, 3]) == [[1], [3]]
    counts = bench.mover.telemetry.total(Phase.DECODE, 1)
    assert (counts.hits, counts.late, counts.misses) == (0, 2, 0)
    assert sorted(bench.reader.reads) == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_a_wrong_guess_is_withdrawn_unless_it_has_begun(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3, 4))
    assert bench.use(1, [5]) == [[5]]
    assert bench.reader.withdrawn == [(1, 3), (1, 4)]
    assert [bench.has(1, e) for e in (1, 2, 3, 4)] == [True, True, False, False]
    telemetry = bench.mover.telemetry
    assert (telemetry.guesses, telemetry.bytes_speculated) == (2, 2 * RECORD)
    assert bench.mover.link.active == 0


def test_a_second_guess_takes_the_place_of_what_has_not_begun(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3, 4))
    bench.mover.speculate(guess(1, 2, 4, 5))
    assert bench.reader.withdrawn == [(1, 3)]
    assert [r.key.expert for r in bench.reader.waiting] == [4, 5]


def test_a_failed_read_fails_its_request_alone(bench: Bench) -> None:
    bench.reader.fail = lambda key: key.expert == 2
    with pytest.raises(ReadError, match="expert 2"):
        bench.use(0, [1, 2, 3])
    bench.reader.fail = lambda key: False
    assert sorted(chain.from_iterable(bench.use(0, [1, 2, 3]))) == [1, 2, 3]
    assert not bench.mover.take_failure(ExpertKey(0, 2))


def test_a_failed_guess_fails_nothing(bench: Bench) -> None:
    bench.reader.fail = lambda key: key.expert == 2
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2))
    bench.reader.land()
    assert bench.use(1, [1]) == [[1]]
    assert not bench.has(1, 2)


def test_a_request_that_fails_withdraws_what_it_wanted(bench: Bench) -> None:
    class StopError(Exception): ...

    with pytest.raises(StopError), bench.mover.lease(Choice(0, [1, 2, 3, 4], 1)):
        raise StopError
    assert bench.reader.withdrawn == [(0, 3), (0, 4)]
    assert bench.mover.telemetry.bytes_demand == 2 * RECORD
    assert sorted(chain.from_iterable(bench.use(0, [1, 2, 3, 4]))) == [1, 2, 3, 4]
    assert bench.reader.reads.count(ExpertKey(0, 1)) == 1


def test_prefill_has_reader_threads_and_waits_for_what_is_on_its_way(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3))
    pieces = bench.use(1, [1, 5, 6], phase=Phase.PREFILL)
    assert sorted(chain.from_iterable(pieces)) == [1, 5, 6]
    assert not bench.mover.filler.under_way
    assert bench.mover.telemetry.total(Phase.PREFILL).hits == 1
    bench.use(0, [1, 2], guess(1, 8), phase=Phase.PREFILL)
    assert not bench.reader.begun


def test_reset_takes_back_guesses_and_leaves_demands(bench: Bench) -> None:
    bench.use(0, [0])
    with bench.mover.lease(Choice(0, [1, 2, 3], 1)) as arriving:
        bench.mover.speculate(guess(1, 1))
        bench.mover.reset()
        assert sorted(e for piece in arriving for e, *_ in piece) == [1, 2, 3]
    assert bench.reader.withdrawn == [(1, 1)]


def test_a_reset_beside_a_wait_takes_in_what_was_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(most_s: float) -> bool:
        bench.reader.land()
        bench.mover.reset()  # another thread could: the lock is free
        return False

    monkeypatch.setattr(bench.reader, "wait", wait)
    assert bench.use(0, [1, 2]) == [[1, 2]]


def test_reader_threads_sleep_while_reads_come_in_by_themselves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.use(0, [0])
    monkeypatch.setattr(bench.mover._readers, "wake", lambda: pytest.fail("woken for nothing"))
    bench.use(0, [1, 2], guess(1, 1, 2, 3))
    bench.use(1, [1, 5])


def test_after_an_interrupt_nothing_of_the_old_table_lands(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3))
    with pytest.raises(KeyboardInterrupt), bench.mover.section:
        raise KeyboardInterrupt
    assert bench.use(1, [1]) == [[1]]
    assert bench.reader.forgotten == 1
    assert not bench.has(1, 2)
    assert bench.mover.link.active == 0


def test_a_disk_that_is_gone_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.reader, "wait", lambda most_s: False)
    with pytest.raises(ReadError, match="is the disk gone"):
        bench.use(0, [1])


def test_a_closed_engine_says_so(bench: Bench) -> None:
    bench.use(0, [0])
    bench.mover.speculate(guess(1, 1, 2, 3))
    bench.mover.close()
    with pytest.raises(CacheError, match="closed"):
        bench.use(1, [1])
