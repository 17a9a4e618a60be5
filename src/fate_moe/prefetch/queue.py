"""Which read comes next?

Two ranks: demands before guesses, each first come first served. A guess that becomes a demand is
promoted; a guess whose layer has passed is cancelled before it costs a byte. Pure: no threads, no
bytes, no torch; callers hold one lock around every call.
Invariants: a key is queued at most once; queued guesses never exceed `guess_bytes_cap`.
"""

from __future__ import annotations

from collections.abc import Callable

from fate_moe.cache.table import Entry
from fate_moe.types import ExpertKey


class ReadQueue:
    """Reads that no reader has started."""

    def __init__(self, guess_bytes_cap: int) -> None:
        self.guess_bytes_cap = guess_bytes_cap
        self.guess_bytes = 0
        self._demands: dict[ExpertKey, Entry] = {}
        self._guesses: dict[ExpertKey, tuple[Entry, int]] = {}

    def __len__(self) -> int:
        return len(self._demands) + len(self._guesses)

    def push_demand(self, entry: Entry) -> None:
        """Queue a read that the router needs."""
        self._demands[entry.key] = entry

    def has_room(self, read_bytes: int) -> bool:
        """Say whether a guess of `read_bytes` would stay within the cap."""
        return self.guess_bytes + read_bytes <= self.guess_bytes_cap

    def push_guess(self, entry: Entry, read_bytes: int) -> None:
        """Queue a read that may turn out useless; the caller asked `has_room` first."""
        self._guesses[entry.key] = (entry, read_bytes)
        self.guess_bytes += read_bytes

    def promote(self, key: ExpertKey) -> None:
        """Make a queued guess a demand; no effect when it is not queued."""
        if key in self._guesses:
            entry, read_bytes = self._guesses.pop(key)
            self.guess_bytes -= read_bytes
            self._demands[key] = entry

    def cancel(self, unwanted: Callable[[ExpertKey], bool]) -> list[Entry]:
        """Take the queued guesses that are `unwanted` out and return their entries."""
        gone = [key for key in self._guesses if unwanted(key)]
        return [self._take_guess(key) for key in gone]

    def withdraw(self, key: ExpertKey) -> Entry | None:
        """Take a queued demand out (its request failed), or return None if a reader has it."""
        return self._demands.pop(key, None)

    def pop(self) -> Entry | None:
        """Return the next read, or None."""
        if self._demands:
            return self._demands.pop(next(iter(self._demands)))
        if self._guesses:
            return self._take_guess(next(iter(self._guesses)))
        return None

    def _take_guess(self, key: ExpertKey) -> Entry:
        entry, read_bytes = self._guesses.pop(key)
        self.guess_bytes -= read_bytes
        return entry
