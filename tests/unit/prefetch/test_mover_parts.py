"""Heads and rests: no more is read than needed, and what is handed over is what was asked for."""

from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.cache import ExpertTable, make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.cache.table import Part
from fate_moe.errors import ReadError
from fate_moe.prefetch.mover import Mover
from fate_moe.prefetch.parts import Parts
from fate_moe.store.reader import Request
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests.fakes import FakeReader
from tests.unit.prefetch.test_mover_background import FakeBackgroundReader

HEAD, RECORD = 8192, 20480


def content(key: ExpertKey) -> bytes:
    """Whose record, and which page of it."""
    return b"".join(bytes([100 * key.layer + 7 * key.expert + page]) * 4096 for page in range(5))


class PartReader(FakeReader):
    """Fills parts of records; remembers which."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[ExpertKey, int, int]] = []

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        self.gate.wait(10)
        assert length == len(buffer)
        if self.fail(key):
            raise ReadError(key, "fake", start, 5, "injected")
        buffer[:] = content(key)[start : start + length]
        self.parts.append((key, start, length))


class BackgroundPartReader(FakeBackgroundReader):
    """The same for reads that come in by themselves."""

    batch_bytes = 2 * RECORD

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[ExpertKey, int, int]] = []

    def record_bytes(self, layer: int) -> int:
        return RECORD

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        PartReader.read_into(self, key, buffer, start, length)  # type: ignore[arg-type]

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        for one in requests:
            self.read_into(one.key, one.buffer, one.start, one.length)
        return [None] * len(requests)


class Bench:
    def __init__(self, in_background: bool = False, capacities: Sequence[int] = (3, 3)) -> None:
        self.reader = BackgroundPartReader() if in_background else PartReader()
        spare = 3
        self.memory = bytearray(RECORD * (sum(capacities) + spare))
        table = ExpertTable(Regions.per_layer(capacities), spare, lambda c: make_cache("lru", c))
        self.mover = Mover(
            table, self.reader, self, [RECORD] * len(capacities), io_threads=2, window=99,
            head_bytes=[HEAD] * len(capacities),
        )  # fmt: skip

    def view(self, slot: int) -> memoryview:
        return memoryview(self.memory)[slot * RECORD : (slot + 1) * RECORD]

    def used(self, slots: Sequence[int]) -> None:
        """Plain memory has been read when it has been read."""

    def use(
        self,
        layer: int,
        experts: Sequence[int],
        low: Sequence[int] = (),
        ahead: Prediction | None = None,
        tokens: int = 2,
    ) -> None:
        """Run one layer's turn; check that every slot has the bytes that are computed from."""
        choice = Choice(layer, experts, tokens, low=frozenset(low))
        with self.mover.lease(choice) as arriving:
            self.mover.speculate(ahead)
            for expert, slot, is_low in chain.from_iterable(arriving):
                assert is_low == (expert in low)
                need = HEAD if is_low else RECORD
                assert bytes(self.view(slot)[:need]) == content(ExpertKey(layer, expert))[:need]
        with self.mover.section:
            self.mover.table.check()
        assert not any(entry.locks for entry in self.mover.table.entries())

    def parts(self, layer: int, expert: int) -> list[tuple[int, int]]:
        return [(s, n) for key, s, n in self.reader.parts if key == (layer, expert)]

    def part(self, layer: int, expert: int) -> Part:
        entry = self.mover.table.get(ExpertKey(layer, expert))
        assert entry is not None
        return entry.part


def test_a_head_is_read_alone_and_made_whole_by_its_rest() -> None:
    b = Bench()
    b.use(0, [1, 2], low=[2])
    assert b.parts(0, 1) == [(0, RECORD)]
    assert b.parts(0, 2) == [(0, HEAD)]
    telemetry = b.mover.telemetry
    assert telemetry.bytes_demand == RECORD + HEAD == b.mover.link.bytes
    b.use(0, [1, 2], low=[1, 2])  # a whole record serves as a head
    assert telemetry.total().misses == 2
    b.use(0, [1, 2], tokens=1)
    assert b.parts(0, 2) == [(0, HEAD), (HEAD, RECORD - HEAD)]
    counts = telemetry.total(Phase.DECODE)
    assert (counts.hits, counts.misses, counts.partial) == (1, 1, 1)
    assert telemetry.bytes_demand == 2 * RECORD == b.mover.link.bytes
    b.use(0, [1, 2], tokens=1)
    assert telemetry.total(Phase.DECODE).hits == 3
    b.mover.close()


def test_light_experts_are_low_only_where_they_are_not_whole() -> None:
    b = Bench(capacities=(6, 6))
    b.use(0, [1, 2, 3], low=[2])

    def light(*experts: int) -> dict[int, bool]:
        with b.mover.lease(Choice(0, experts, light=frozenset([1, 2, 4, 9]))) as arriving:
            return {expert: low for expert, _, low in chain.from_iterable(arriving)}

    # Whole in its slot, its head there, not light, nothing there:
    assert light(1, 2, 3, 4) == {1: False, 2: True, 3: False, 4: True}
    assert b.parts(0, 4) == [(0, HEAD)]
    counts = b.mover.telemetry.total(Phase.DECODE)
    assert (counts.requests, counts.hits, counts.misses, counts.low) == (4, 3, 1, 2)
    b.use(0, [4], tokens=1)  # now it is needed whole
    assert light(4) == {4: False}
    assert b.parts(0, 4) == [(0, HEAD), (HEAD, RECORD - HEAD)]
    b.mover.close()


def test_a_light_expert_that_is_on_its_way_whole_is_waited_for() -> None:
    b = Bench()
    b.reader.gate.clear()
    b.mover.speculate(Prediction(0, (1,), 1))
    while not b.mover._readers.reading:
        pass
    with b.mover.lease(Choice(0, [1, 2], light=frozenset([1, 2]))) as arriving:
        b.reader.gate.set()
        landed = {expert: low for expert, _, low in chain.from_iterable(arriving)}
    assert landed == {1: False, 2: True}
    assert (b.parts(0, 1), b.parts(0, 2)) == ([(0, RECORD)], [(0, HEAD)])
    b.mover.close()


def test_where_a_head_is_no_fewer_bytes_light_experts_are_whole() -> None:
    b = Bench()
    b.mover._parts = Parts([RECORD] * 2, [RECORD] * 2)
    with b.mover.lease(Choice(0, [1], light=frozenset([1]))) as arriving:
        assert [low for _, _, low in chain.from_iterable(arriving)] == [False]
    b.mover.close()


def test_a_guessed_head_that_is_not_enough_is_followed_by_its_rest() -> None:
    b = Bench()
    b.reader.gate.clear()
    guess = Prediction(1, (4, 5), 2, low=frozenset([4, 5]))
    b.mover.speculate(guess)
    while b.mover._readers.reading < 2:
        pass
    lease = b.mover.lease(Choice(1, [4, 5], 2, low=frozenset([5])))
    b.reader.gate.set()
    with lease as arriving:
        for expert, slot, low in chain.from_iterable(arriving):
            need = HEAD if low else RECORD
            assert bytes(b.view(slot)[:need]) == content(ExpertKey(1, expert))[:need]
    assert sorted(b.parts(1, 4)) == [(0, HEAD), (HEAD, RECORD - HEAD)]
    assert b.parts(1, 5) == [(0, HEAD)]
    b.mover.close()


def test_a_queued_head_that_is_not_enough_is_read_whole() -> None:
    b = Bench()
    b.reader.gate.clear()
    b.mover.speculate(Prediction(0, (1, 2, 3), 3, low=frozenset([1, 2, 3])))
    while b.mover._readers.reading < 2:
        pass
    with b.mover.lease(Choice(0, [3], 2)) as arriving:
        b.reader.gate.set()
        assert [expert for expert, *_ in chain.from_iterable(arriving)] == [3]
    assert b.parts(0, 3) == [(0, RECORD)]
    telemetry = b.mover.telemetry
    assert (telemetry.bytes_demand, telemetry.bytes_speculated) == (0, RECORD + 2 * HEAD)
    b.mover.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_guess_makes_a_head_whole_while_the_link_is_idle(in_background: bool) -> None:
    b = Bench(in_background)
    b.use(1, [1, 2, 3], low=[1, 2, 3])
    b.use(0, [1], ahead=Prediction(1, (1, 2), 2), tokens=1)
    b.use(1, [1], tokens=1)
    assert b.parts(1, 1) == [(0, HEAD), (HEAD, RECORD - HEAD)]
    counts = b.mover.telemetry.total(Phase.DECODE, 1)
    assert counts.misses == 0
    b.use(1, [1, 2, 3], low=[1, 2, 3])
    assert b.parts(1, 3) == [(0, HEAD)]
    b.mover.close()


def test_a_guess_that_is_taken_back_leaves_the_head() -> None:
    b = Bench(in_background=True)
    b.use(1, [1, 2, 3], low=[1, 2, 3])
    b.use(0, [1], tokens=1)
    assert isinstance(b.reader, BackgroundPartReader)
    b.reader.at_once = 0
    b.mover.speculate(Prediction(1, (1, 2), 2))
    assert b.part(1, 1) is Part.REST
    b.mover.reset()
    assert b.part(1, 1) is Part.REST  # the router chose it before: its read goes on
    b.reader.at_once = 2
    b.reader._begin()
    b.use(1, [1, 2], tokens=1)
    assert b.part(1, 1) is Part.WHOLE
    b.mover.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_request_that_ends_early_leaves_the_head(in_background: bool) -> None:
    class StopError(Exception): ...

    b = Bench(in_background)
    b.use(0, [1], low=[1])
    if isinstance(b.reader, BackgroundPartReader):
        b.reader.at_once = 0
    b.reader.gate.clear()
    with pytest.raises(StopError), b.mover.lease(Choice(0, [1], 1)):
        raise StopError
    b.reader.gate.set()
    if isinstance(b.reader, BackgroundPartReader):
        assert b.part(0, 1) is Part.HEAD
        assert b.mover.telemetry.bytes_demand == HEAD
        b.reader.at_once = 2
    b.use(0, [1], tokens=1)
    assert sum(n for _, n in b.parts(0, 1)) == RECORD
    b.mover.close()


def test_a_rest_that_cannot_be_read_fails_its_request_and_is_read_anew() -> None:
    b = Bench()
    b.use(0, [1], low=[1])
    b.reader.fail = lambda key: True
    with pytest.raises(ReadError, match="injected"):
        b.use(0, [1])
    b.reader.fail = lambda key: False
    b.use(0, [1])
    assert b.parts(0, 1) == [(0, HEAD), (0, RECORD)]
    b.mover.close()


steps = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sets(st.integers(0, 5), min_size=1, max_size=5),
        st.sets(st.integers(0, 5)),
        st.one_of(st.none(), st.sets(st.integers(0, 5), min_size=1)),
        st.sets(st.integers(0, 5)),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.booleans())
def test_any_order_of_needs_and_guesses_hands_over_the_right_bytes(
    steps: list[tuple[int, set[int], set[int], set[int] | None, set[int], bool]],
    in_background: bool,
) -> None:
    b = Bench(in_background)
    try:
        for layer, experts, low, guessed, guessed_low, decodes in steps:
            ahead = None
            if guessed is not None:
                ahead = Prediction(1 - layer, tuple(guessed), 1, low=frozenset(guessed_low))
            wanted = sorted(experts)
            b.use(layer, wanted, sorted(low & experts), ahead, tokens=1 if decodes else 2)
        telemetry = b.mover.telemetry
        with b.mover.section:
            b.mover._cancel(lambda key: True)
        assert all(n in (HEAD, RECORD, RECORD - HEAD) for _, _, n in b.reader.parts)
        assert telemetry.bytes_demand >= 0
        assert telemetry.bytes_speculated >= 0
    finally:
        b.mover.close()
