"""What does a layer hold while it computes?

The experts one layer needs now, locked until used. Made by `Mover.lease`, used by one thread, one
at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from fate_moe.cache.table import Entry
from fate_moe.errors import ReadError
from fate_moe.types import Choice, ExpertKey

if TYPE_CHECKING:
    from fate_moe.prefetch.mover import Mover

POLL_S = 60.0
"""Longest wait for any read to land before the disk counts as gone."""


class Lease:
    """The experts one layer needs now, handed over as they land, residents first.

    An expert is locked from the start of the lease until whatever follows it is asked for, or the
    lease ends. Made by `Mover.lease`; used by one thread.
    """

    def __init__(self, mover: Mover, choice: Choice, keys: list[ExpertKey], together: int) -> None:
        """Lock what has a slot, place what has none. Runs under the mover's lock.

        Args:
            choice: what the router chose.
            keys: its experts, distinct.
            together: most experts handed over at once; slots come free only between them.
        """
        self._mover = mover
        self._low = choice.low
        self._together = together
        self._held: dict[ExpertKey, Entry] = {}
        self._homeless: list[ExpertKey] = []
        self._current: list[ExpertKey] = []
        found = {key: mover.table.get(key) for key in keys}
        # Lock first: no expert of this lease may make room for another one of it.
        for key, entry in found.items():
            if entry is not None:
                mover.join(key, entry, key.expert in self._low)
                self._held[key] = entry
        for key, entry in found.items():
            if entry is not None:
                mover.table.touch(entry)
            else:
                mover.table.note_miss(key)
                self._homeless.append(key)
        self._place_homeless()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            left = self._held or self._homeless or self._current
            if left and not self._mover.section.torn:
                with self._mover.section:
                    self._homeless.clear()
                    self._release_current()
                    for entry in self._held.values():
                        self._mover.abandon(entry)
                    self._held.clear()
        finally:
            self._mover.end_lease()

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        """Yield the (expert, slot, low) of experts that have landed, at least one each time.

        Raises:
            ReadError: a record of this lease could not be read.
        """
        while True:
            with self._mover.section:
                self._release_current()
                if not self._held and not self._homeless:
                    return
                landed, failure = self._wait_for_some()
            if failure is not None:
                raise failure
            self._current = landed
            held, low = self._held, self._low
            yield [(key.expert, held[key].slot, key.expert in low) for key in landed]

    def _wait_for_some(self) -> tuple[list[ExpertKey], Exception | None]:
        began: float | None = None
        while True:
            if self._homeless:
                self._place_homeless()
            landed = [key for key, entry in self._held.items() if entry.resident]
            if landed:
                if began is not None:
                    self._mover.telemetry.stall_s += time.perf_counter() - began
                return landed[: self._together], None
            for key in self._held:
                failure = self._mover.take_failure(key)
                if failure is not None:
                    del self._held[key]  # the mover has taken it out of the table
                    return [], failure
            began = time.perf_counter() if began is None else began
            if not self._mover.wait(POLL_S):
                key = next(iter(self._held), None) or self._homeless[0]
                why = f"no read has landed within {POLL_S:.0f} s; is the disk gone?"
                return [], ReadError(key, "the store", 0, None, why)

    def _release_current(self) -> None:
        if self._current:
            entries = [self._held.pop(key) for key in self._current]
            self._mover.filler.slots.used([entry.slot for entry in entries])
            for entry in entries:
                self._mover.table.unlock(entry)
            self._current = []
            if self._homeless:
                self._place_homeless()
            if not self._homeless:
                self._mover.place_guesses()  # the slot that came free may serve one

    def _place_homeless(self) -> None:
        while self._homeless:
            entry = self._mover.place(self._homeless[0], self._homeless[0].expert in self._low)
            if entry is None:
                break
            entry.locks += 1
            self._held[self._homeless.pop(0)] = entry
        self._mover.start_reads()
