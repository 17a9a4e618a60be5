"""How does a record get from disk into a slot of a GPU?

Through pinned memory, by a reader thread: the disk reads into it, the card copies from it. What the
card's own cache misses most stays there, so that the disk is asked for the rest alone. A whole
record takes a place if it may; a piece of one (an INT2 head, what follows it) never does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fate_moe.cache import EvictionPolicy
from fate_moe.prefetch.copies import Clock, DeviceSlots
from fate_moe.store.reader import Mode, RecordReader
from fate_moe.types import ExpertKey

Room = tuple[memoryview, Any]
"""One record's pinned memory: as a reader fills it, and as a device copies from it."""


@dataclass(slots=True, eq=False)
class _Kept:
    """A record in pinned memory.

    Attributes:
        place: which.
        users: threads that fill it or copy from it.
    """

    place: int
    users: int = 1


class HostCache:
    """Which records lie in pinned memory? Any thread may ask.

    Attributes:
        places: how many there is room for.
        hits, misses: reads that found their record, and that did not.
    """

    def __init__(self, places: int, policy: EvictionPolicy, room: Callable[[int], Room]) -> None:
        """Start empty.

        Args:
            places: how many records there is room for.
            policy: whom to evict; of that many places.
            room: of a place.
        """
        self.places = places
        self.hits = self.misses = 0
        self._room = room
        self._policy = policy
        self._free = list(range(places))
        self._kept: dict[ExpertKey, _Kept] = {}
        self._lock = threading.Lock()

    def find(self, key: ExpertKey) -> Room | None:
        """Return a record's memory if it is there; `let_go` when it has been copied."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                self.misses += 1
                self._policy.miss(key)
                return None
            self.hits += 1
            kept.users += 1
            self._policy.hit(key)
            return self._room(kept.place)

    def claim(self, key: ExpertKey) -> Room | None:
        """Return memory to read a record into, that of another if need be; None: read elsewhere.

        `let_go` when it has been read and copied, `drop` if it was not.
        """
        with self._lock:
            if not self._free:
                victim = self._policy.victim(key, lambda old: not self._kept[old].users)
                if victim is None or not self._policy.admits(key, victim):
                    return None
                self._policy.evict(victim)
                self._free.append(self._kept.pop(victim).place)
            place = self._free.pop()
            self._kept[key] = _Kept(place)
            self._policy.admit(key)
            return self._room(place)

    def let_go(self, key: ExpertKey) -> None:
        """Note that a thread is done with a record."""
        with self._lock:
            self._kept[key].users -= 1

    def drop(self, key: ExpertKey) -> None:
        """Forget a record that could not be read."""
        with self._lock:
            self._policy.forget(key)
            self._free.append(self._kept.pop(key).place)


class StagedReader:
    """A RecordReader into a device's slots, through pinned memory that another reader fills.

    At most one read of a record is under way, as of every reader.
    """

    def __init__(
        self,
        inner: RecordReader,
        slots: DeviceSlots,
        clock: Clock,
        cache: HostCache,
        stage: Callable[[], Room],
        free: Callable[[], None],
    ) -> None:
        """Wrap a reader.

        Args:
            inner: fills memory of the host.
            slots, clock: as of `CopyEngine`.
            cache: of what has been read.
            stage: makes room for one record that is not to be kept; called once by each thread.
            free: gives all pinned memory back.
        """
        self._inner = inner
        self._slots = slots
        self._clock = clock
        self.cache = cache
        self._stage = stage
        self._free = free
        self._own = threading.local()

    @property
    def mode(self) -> Mode:
        """As of the reader inside."""
        return self._inner.mode

    def record_bytes(self, layer: int) -> int:
        """As of the reader inside."""
        return self._inner.record_bytes(layer)

    def read_into(
        self, key: ExpertKey, buffer: Any, start: int = 0, length: int | None = None
    ) -> None:
        """Fill a part of a device's slot, and return when it has arrived; see RecordReader."""
        whole = self.record_bytes(key.layer)
        count = whole - start if length is None else length
        room = self.cache.find(key)
        if room is None and count == whole:
            room = self.cache.claim(key)
            if room is not None:
                self._fill_kept(key, room, count)
        if room is None:
            view, source = self._staged()
            self._inner.read_into(key, view[:count], start, count)
            self._copy(buffer, source[:count])
            return
        try:
            self._copy(buffer, room[1][start : start + count])
        finally:
            self.cache.let_go(key)

    def close(self) -> None:
        """Close the reader inside and give the memory back; no thread may be reading."""
        self._inner.close()
        self._free()

    def _fill_kept(self, key: ExpertKey, room: Room, count: int) -> None:
        try:
            self._inner.read_into(key, room[0][:count], 0, count)
        except BaseException:
            self.cache.drop(key)
            raise

    def _staged(self) -> Room:
        if not hasattr(self._own, "room"):
            self._own.room = self._stage()
        room: Room = self._own.room
        return room

    def _copy(self, buffer: Any, source: Any) -> None:
        self._clock.wait(self._slots.fill(buffer, source, True))
