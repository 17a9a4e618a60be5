"""How do bytes get from the reader into slots?

While the caller waits, or in the background. Several small records come in with one call; guesses
of small ones go on by themselves where the reader can do that, since waking a thread of ours takes
as long as their read. Callers hold the mover's lock, except for `fill` and `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fate_moe.cache.table import Entry
from fate_moe.store.reader import BackgroundReader, BatchReader, RecordReader, Request
from fate_moe.types import ExpertKey


class Filler:
    """Fills the slots of entries from a reader."""

    def __init__(
        self,
        reader: RecordReader,
        slot_view: Callable[[int], memoryview],
        record_bytes: Sequence[int],
    ) -> None:
        """Start with nothing under way; arguments as of `Mover`."""
        self._reader = reader
        self._slot_view = slot_view
        self._record_bytes = record_bytes
        self._batches = reader if isinstance(reader, BatchReader) else None
        self.batch_bytes = 0 if self._batches is None else self._batches.batch_bytes
        self.are_small = 2 * max(record_bytes, default=0) <= self.batch_bytes
        self._background = reader if isinstance(reader, BackgroundReader) else None
        self.has_background = self.are_small and self._background is not None
        self.under_way: dict[ExpertKey, Entry] = {}  # in the background

    def fill(self, batch: Sequence[Entry]) -> Sequence[Exception | None]:
        """Fill the slots of a batch and return what went wrong with each."""
        requests = self._requests(batch)
        try:
            if self._batches is not None and len(requests) > 1:
                return self._batches.read_many(requests)
            for request in requests:
                self._reader.read_into(request.key, request.buffer)
        except Exception as error:  # noqa: BLE001 - crosses to the thread that waits for it
            return [error] * len(batch)
        return [None] * len(batch)

    def start(self, batch: Sequence[Entry]) -> None:
        """Begin to fill slots in the background."""
        if batch and self._background is not None:
            self.under_way.update((entry.key, entry) for entry in batch)
            self._background.start(self._requests(batch))

    def withdraw(self, key: ExpertKey) -> Entry | None:
        """Take one back that has not begun, or return None."""
        if key in self.under_way and self._background is not None:
            return self.under_way.pop(key) if self._background.withdraw(key) else None
        return None

    def landed(self) -> list[tuple[Entry, Exception | None, float]]:
        """Return entries of the background, what went wrong and how many seconds ago."""
        if not self.under_way or self._background is None:
            return []
        return [
            (self.under_way.pop(one.key), one.failure, one.ago_s)
            for one in self._background.landed()
        ]

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s`."""
        return self._background is not None and self._background.wait(most_s)

    def forget(self) -> None:
        """Drop all that is in the background; no slot is written to afterwards."""
        self.under_way.clear()
        if self._background is not None:
            self._background.forget()

    def _requests(self, batch: Sequence[Entry]) -> list[Request]:
        return [
            Request(e.key, self._slot_view(e.slot)[: self._record_bytes[e.key.layer]])
            for e in batch
        ]
