"""Where are the slots, and what fills them?

Without `--vram` they lie in the host's memory and are read into from disk. With it they lie on the
GPU: above pinned memory that holds all records, if `--ram` has room for that, else as many as fit,
above the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from fate_moe.cache import make_cache
from fate_moe.engine.plan import Blueprint
from fate_moe.memory import Arena
from fate_moe.memory.device import Card, DeviceArena
from fate_moe.prefetch.copies import CopyEngine
from fate_moe.prefetch.staged import HostCache, Room, StagedReader
from fate_moe.store.reader import RecordReader
from fate_moe.types import ExpertKey, Progress

_HOST_POLICY = "lfru"
"""Of what lies between a GPU and the disk: it sees what the GPU's own cache misses, and on real
traces it keeps the most of that (docs/experiments.md)."""


class PinnedRecords:
    """All records of a store, each layer's in an allocation of its own that a GPU copies from."""

    def __init__(self, experts: Sequence[int], record_bytes: Sequence[int], card: Card) -> None:
        """Make room.

        Args:
            experts: of each layer, [L].
            record_bytes: of one record of each layer, [L].
            card: locks the memory.
        Raises:
            ConfigError: the system lets this process lock no more.
        """
        self._card = card
        self._arenas: list[Arena] = []
        try:
            for count, size in zip(experts, record_bytes, strict=True):
                self._arenas.append(_pinned(card, count, size))
        except BaseException:
            self.close()
            raise

    def load(self, reader: RecordReader, threads: int, progress: Progress) -> None:
        """Read everything.

        Raises:
            ReadError: a record cannot be read.
        """
        keys = [
            ExpertKey(layer, expert)
            for layer, arena in enumerate(self._arenas)
            for expert in range(arena.slots)
        ]

        def read(key: ExpertKey) -> None:
            reader.read_into(key, self._arenas[key.layer].view(key.expert))

        progress("reading experts", 0, len(keys))
        with ThreadPoolExecutor(threads) as pool:
            try:
                for done, _ in enumerate(pool.map(read, keys), 1):
                    progress("reading experts", done, len(keys))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def part(self, key: ExpertKey, start: int, length: int | None) -> Tensor:
        """Return bytes [start, start + length) of a record; the rest of it if None."""
        end = None if length is None else start + length
        return self._arenas[key.layer].tensor(key.expert)[start:end]

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        return self._arenas[layer].slot_bytes

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        while self._arenas:
            self._card.unpin(self._arenas.pop())


def open_slots(
    blueprint: Blueprint, reader: RecordReader, progress: Progress
) -> tuple[Arena | DeviceArena, RecordReader]:
    """Make the slots of a run, and what fills them.

    Args:
        reader: of the store; closed by closing what is returned, or at once if this fails.
    Raises:
        ReadError: a record cannot be read; ConfigError: no more memory can be locked.
    """
    memory, card, host = blueprint.memory, blueprint.card, blueprint.host
    slots, slot_bytes = memory.slots, memory.demands.slot_bytes
    if card is None or host is None:
        return Arena(slots, slot_bytes), reader
    try:
        arena = DeviceArena(slots, slot_bytes, card)
        threads = blueprint.config.prefetch.io_threads
        if host.slots < sum(blueprint.experts):
            return arena, _staged(reader, arena, card, host.slots - threads, slot_bytes)
        sizes = [layer.record_bytes for layer in blueprint.manifest.layers]
        records = PinnedRecords(blueprint.experts, sizes, card)
        try:
            records.load(reader, threads, progress)
        except BaseException:
            records.close()
            raise
    except BaseException:
        reader.close()
        raise
    reader.close()
    return arena, CopyEngine(records, arena, card)


def _staged(
    reader: RecordReader, arena: DeviceArena, card: Card, places: int, slot_bytes: int
) -> StagedReader:
    kept = _pinned(card, places, slot_bytes)
    arenas = [kept]

    def stage() -> Room:
        own = _pinned(card, 1, slot_bytes)
        arenas.append(own)
        return own.view(0), own.tensor(0)

    def free() -> None:
        while arenas:
            card.unpin(arenas.pop())

    def room(place: int) -> Room:
        return kept.view(place), kept.tensor(place)

    cache = HostCache(places, make_cache(_HOST_POLICY, places), room)
    return StagedReader(reader, arena, card, cache, stage, free)


def _pinned(card: Card, slots: int, slot_bytes: int) -> Arena:
    arena = Arena(slots, slot_bytes)
    card.pin(arena)
    return arena
