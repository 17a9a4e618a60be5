"""Which reads come next?

Two ranks: demands before guesses, each first come first served. A guess that becomes a demand is
promoted; a guess whose layer has passed is cancelled before it costs a byte. Pure: no threads, no
bytes, no torch; callers hold one lock around every call.
Invariant: a key is queued at most once. How many guesses there are is the mover's window.
"""

from __future__ import annotations

from collections.abc import Callable

from fate_moe.cache.table import Entry
from fate_moe.types import ExpertKey


class ReadQueue:
    """Reads that no reader has started."""

    def __init__(self, bytes_of: Callable[[Entry], int]) -> None:
        """Start empty; `bytes_of` says how much the read of an entry brings."""
        self._bytes_of = bytes_of
        self._demands: dict[ExpertKey, Entry] = {}
        self._guesses: dict[ExpertKey, Entry] = {}

    def __len__(self) -> int:
        return len(self._demands) + len(self._guesses)

    def push_demand(self, entry: Entry) -> None:
        """Queue a read that the router needs."""
        self._demands[entry.key] = entry

    def push_guess(self, entry: Entry) -> None:
        """Queue a read that may turn out useless."""
        self._guesses[entry.key] = entry

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._demands or key in self._guesses

    def promote(self, key: ExpertKey) -> None:
        """Make a queued guess a demand; no effect when it is not queued."""
        if key in self._guesses:
            self._demands[key] = self._guesses.pop(key)

    def cancel(self, unwanted: Callable[[ExpertKey], bool]) -> list[Entry]:
        """Take the queued guesses that are `unwanted` out and return their entries."""
        if not self._guesses:
            return []
        gone = [key for key in self._guesses if unwanted(key)]
        return [self._guesses.pop(key) for key in gone]

    def withdraw(self, key: ExpertKey) -> Entry | None:
        """Take a queued demand out (its request failed), or return None if a reader has it."""
        return self._demands.pop(key, None)

    def take(self, most_bytes: int = 0) -> list[Entry]:
        """Take out the next read and what follows it in its rank, up to `most_bytes` in sum.

        One read may be larger than that. Demands never share a batch with guesses, which could
        only make them land later. Empty when nothing is queued.
        """
        return self.take_demands(most_bytes) or self._take(self._guesses, most_bytes)

    def take_all(self) -> list[Entry]:
        """Take everything out, demands first."""
        batch = [*self._demands.values(), *self._guesses.values()]
        self._demands.clear()
        self._guesses.clear()
        return batch

    def take_demands(self, most_bytes: int = 0) -> list[Entry]:
        """Take demands out as `take` does, guesses never."""
        return self._take(self._demands, most_bytes)

    def _take(self, waiting: dict[ExpertKey, Entry], most_bytes: int) -> list[Entry]:
        batch: list[Entry] = []
        for entry in waiting.values():
            most_bytes -= self._bytes_of(entry)
            if batch and most_bytes < 0:
                break
            batch.append(entry)
        for entry in batch:
            del waiting[entry.key]
        return batch
