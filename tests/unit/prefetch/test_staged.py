"""Records that pass through pinned memory: the right bytes, the fewest reads, nothing lost."""

import random
import threading
from collections.abc import Callable

import pytest
import torch

from fate_moe.cache import make_cache
from fate_moe.errors import ReadError
from fate_moe.memory import Arena
from fate_moe.memory.device import DeviceArena
from fate_moe.prefetch.staged import HostCache, Room, StagedReader
from fate_moe.store.reader import Mode
from fate_moe.types import ExpertKey
from tests.cards import FakeCard

RECORD, HEAD = 8192, 4096


def content(key: ExpertKey) -> torch.Tensor:
    own = torch.Generator().manual_seed(key.expert)  # the global one is shared by threads
    return torch.randint(0, 256, (RECORD,), dtype=torch.uint8, generator=own)


class Disk:
    """Hands out records; remembers what it was asked for."""

    mode: Mode = "buffered"

    def __init__(self) -> None:
        self.reads: list[tuple[int, int, int | None]] = []
        self.fail: Callable[[ExpertKey], bool] = lambda key: False

    def record_bytes(self, layer: int) -> int:
        return RECORD

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        self.reads.append((key.expert, start, length))
        if self.fail(key):
            raise ReadError(key, "a disk", 0, 5, "injected")
        end = RECORD if length is None else start + length
        buffer[:] = memoryview(content(key)[start:end].numpy())

    def close(self) -> None:
        """Nothing is open."""


class Bench:
    def __init__(self, places: int) -> None:
        self.disk, self.card = Disk(), FakeCard(chance=0.0)
        self.arena = DeviceArena(64, RECORD, self.card)
        kept, stages = Arena(places, RECORD), list[Arena]()

        def room(place: int) -> Room:
            return kept.view(place), kept.tensor(place)

        def stage() -> Room:
            stages.append(Arena(1, RECORD))
            return stages[-1].view(0), stages[-1].tensor(0)

        self.stages = stages
        self.cache = HostCache(places, make_cache("lru", places), room)
        self.reader = StagedReader(
            self.disk, self.arena, self.card, self.cache, stage, lambda: None
        )

    def read(self, expert: int, start: int = 0, end: int = RECORD, slot: int = 0) -> None:
        """Read into a slot and check the bytes that came."""
        key = ExpertKey(0, expert)
        self.reader.read_into(key, self.arena.view(slot)[start:end], start, end - start)
        assert torch.equal(self.arena.tensor(slot)[start:end], content(key)[start:end])


def test_what_was_read_is_not_read_again() -> None:
    b = Bench(2)
    for expert in (1, 2, 1, 3, 1, 2):
        b.read(expert)
    # Three took the place of two, the longest unused, which then took that of three.
    assert [expert for expert, _, _ in b.disk.reads] == [1, 2, 3, 2]
    assert (b.cache.hits, b.cache.misses) == (2, 4)
    assert not b.stages


def test_pieces_are_served_from_what_is_kept_but_never_kept() -> None:
    b = Bench(2)
    b.read(1, 0, HEAD)
    b.read(1, HEAD, RECORD)
    assert b.disk.reads == [(1, 0, HEAD), (1, HEAD, RECORD - HEAD)]
    b.read(1)
    b.read(1, HEAD, RECORD)
    b.read(1, 0, HEAD)
    assert len(b.disk.reads) == 3
    assert len(b.stages) == 1


def test_without_a_place_all_pass_through() -> None:
    b = Bench(0)
    for expert in (1, 2, 1):
        b.read(expert)
    assert len(b.disk.reads) == 3
    assert b.cache.hits == 0


def test_a_failed_read_leaves_its_place() -> None:
    b = Bench(1)
    b.disk.fail = lambda key: key.expert == 5
    for _ in range(2):
        with pytest.raises(ReadError, match="injected"):
            b.read(5)
    b.read(6)
    b.read(6)
    assert [expert for expert, _, _ in b.disk.reads] == [5, 5, 6]
    b.disk.fail = lambda key: False
    b.read(5)


def test_a_record_in_use_stays() -> None:
    b = Bench(1)
    key = ExpertKey(0, 1)
    b.read(1)
    assert b.cache.find(key) is not None  # a thread copies from it
    b.read(2)
    assert len(b.stages) == 1
    b.cache.let_go(key)
    b.read(2)
    b.read(2)
    assert [expert for expert, _, _ in b.disk.reads] == [1, 2, 2]


def test_threads_side_by_side() -> None:
    b = Bench(6)
    failures: list[BaseException] = []

    def work(slot: int) -> None:
        chance = random.Random(slot)
        try:
            for _ in range(60):  # no two threads ask for the same record
                b.read(4 * chance.randrange(5) + slot, slot=slot)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert b.cache.hits + b.cache.misses == 240
    assert b.cache.hits > 20
    assert len(b.disk.reads) == b.cache.misses
