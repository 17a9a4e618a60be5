"""How do bytes get from the reader into slots?

While the caller waits, or in the background. Several small records come in with one call; guesses
of small ones go on by themselves where the reader can do that, since waking a thread of ours takes
as long as their read. Callers hold the mover's lock, except for `fill` and `wait`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from fate_moe.cache.table import Entry
from fate_moe.prefetch.parts import Parts
from fate_moe.store.reader import BackgroundReader, BatchReader, RecordReader, Request
from fate_moe.telemetry import LinkMeter
from fate_moe.types import ExpertKey, Phase


class Slots(Protocol):
    """Where records go; see `memory.Arena`."""

    def view(self, slot: int) -> Any:
        """Return the writable bytes of a slot, as the reader fills them."""
        ...

    def used(self, slots: Sequence[int]) -> None:
        """Note that all that shall read these slots has been told to."""
        ...


class Filler:
    """Fills the slots of entries from a reader."""

    def __init__(
        self,
        reader: RecordReader,
        slots: Slots,
        parts: Parts,
        link: LinkMeter,
    ) -> None:
        """Start with nothing under way.

        Args:
            reader, slots: as of `Mover`.
            parts: says which bytes an entry's read brings.
            link: told of reads in the background; of the others by whoever calls `fill`.
        """
        self._reader = reader
        self.slots = slots
        self._parts = parts
        self._link = link
        self._batches = reader if isinstance(reader, BatchReader) else None
        self.batch_bytes = 0 if self._batches is None else self._batches.batch_bytes
        self.are_small = 2 * max(parts.record_bytes, default=0) <= self.batch_bytes
        self._background = reader if isinstance(reader, BackgroundReader) else None
        self.under_way: dict[ExpertKey, Entry] = {}  # in the background

    def takes(self, phase: Phase | None) -> bool:
        """Say whether all reads of a phase go on in the background.

        Of small records, in decode; or all, where the reader says so.
        """
        if self._background is None:
            return False
        return self._background.any_size or (self.are_small and phase is Phase.DECODE)

    def fill(self, batch: Sequence[Entry]) -> Sequence[Exception | None]:
        """Fill the slots of a batch and return what went wrong with each."""
        requests = self._requests(batch)
        try:
            if self._batches is not None and len(requests) > 1:
                return self._batches.read_many(requests)
            for one in requests:
                self._reader.read_into(one.key, one.buffer, one.start, one.length)
        except Exception as error:  # noqa: BLE001 - crosses to the thread that waits for it
            return [error] * len(batch)
        return [None] * len(batch)

    def start(self, batch: Sequence[Entry]) -> None:
        """Begin to fill slots in the background."""
        if batch and self._background is not None:
            now_s = time.perf_counter()
            for entry in batch:
                self.under_way[entry.key] = entry
                self._link.begin(now_s)
            self._background.start(self._requests(batch))

    def promote(self, key: ExpertKey) -> None:
        """Note that someone waits for a guess, if it is in the background."""
        if key in self.under_way and self._background is not None:
            self._background.promote(key)

    def withdraw(self, key: ExpertKey) -> Entry | None:
        """Take one back that has not begun, or return None."""
        entry, background = self.under_way.get(key), self._background
        if entry is None or background is None or not background.withdraw(key):
            return None
        self._link.end(time.perf_counter(), 0)
        return self.under_way.pop(key)

    def landed(self) -> list[tuple[Entry, Exception | None]]:
        """Return entries whose reads in the background are over, and what went wrong."""
        if not self.under_way or self._background is None:
            return []
        found: list[tuple[Entry, Exception | None]] = []
        now_s = time.perf_counter()
        for one in self._background.landed():
            entry = self.under_way.pop(one.key)
            self._link.end(now_s - one.ago_s, 0 if one.failure else self._parts.bytes(entry))
            found.append((entry, one.failure))
        return found

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s`."""
        return self._background is not None and self._background.wait(most_s)

    def forget(self) -> None:
        """Drop all that is in the background; no slot is written to afterwards."""
        self.under_way.clear()
        if self._background is not None:
            self._background.forget()

    def _requests(self, batch: Sequence[Entry]) -> list[Request]:
        return [self._parts.request(entry, self.slots.view(entry.slot)) for entry in batch]
