"""How does a record get from the host's memory into a slot of a GPU?

By copies that nobody but the card works on, where all records lie in pinned memory (where they do
not, see `staged`). What a router asked for never queues behind guesses that have not begun.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from fate_moe.errors import ReadError
from fate_moe.store.background import Landed
from fate_moe.store.reader import Mode, Request
from fate_moe.types import ExpertKey

Mark = Any

AHEAD_BYTES = 16 << 20
"""Guesses that the card has been told to copy: those behind them can still be taken back."""


class DeviceSlots(Protocol):
    """Slots on a device; see `memory.device.DeviceArena`."""

    def fill(self, part: Any, source: Any, urgent: bool) -> Mark:
        """Begin to fill a part of a slot, once nothing reads the slot any more."""
        ...


class Clock(Protocol):
    """How far the device is; see `memory.device.Card`."""

    def age_s(self, mark: Mark) -> float | None:
        """Seconds since a mark was passed; None while it was not."""
        ...

    def wait(self, mark: Mark) -> None:
        """Wait until a mark is passed."""
        ...

    def settle(self) -> None:
        """Wait until all copies that were begun are over."""
        ...


class Records(Protocol):
    """All records, in memory that a device can copy from."""

    def part(self, key: ExpertKey, start: int, length: int | None) -> Any:
        """Return bytes [start, start + length) of a record; the rest of it if None."""
        ...

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class CopyEngine:
    """A BackgroundReader of records in pinned memory; reads of any size go on by themselves."""

    any_size = True
    batch_bytes = 0
    mode: Mode = "pinned"

    def __init__(
        self, records: Records, slots: DeviceSlots, clock: Clock, ahead_bytes: int = AHEAD_BYTES
    ) -> None:
        """Start with nothing under way.

        Args:
            records: all there are.
            slots: to fill; a Request's buffer is what they take for a part of a slot.
            clock: of the same device.
            ahead_bytes: guesses that the card is told to copy before it is done with others.
        """
        self._ahead_bytes = ahead_bytes
        self._records = records
        self._slots = slots
        self._clock = clock
        self._lock = threading.Lock()  # `wait` is called without its caller's
        self._begun: dict[ExpertKey, tuple[Mark, int]] = {}  # and how many bytes nobody waits for
        self._waiting: deque[Request] = deque()
        self._guessed_bytes = 0  # all of those

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        return self._records.record_bytes(layer)

    def start(self, requests: Sequence[Request]) -> None:
        """Begin copies: demands now, guesses as far as the card has few to make."""
        with self._lock:
            for request in requests:
                if request.urgent:
                    self._begin(request)
                else:
                    self._waiting.append(request)
            self._begin_guesses()

    def promote(self, key: ExpertKey) -> None:
        """Begin a guess now, if it has not begun: someone waits for it."""
        with self._lock:
            request = self._take_waiting(key)
            if request is not None:
                self._begin(request._replace(urgent=True))
            elif key in self._begun:
                mark, guessed_bytes = self._begun[key]
                self._begun[key] = mark, 0
                self._guessed_bytes -= guessed_bytes

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a copy back that has not begun; see BackgroundReader."""
        with self._lock:
            return self._take_waiting(key) is not None

    def landed(self) -> list[Landed]:
        """Return what came in since the last call."""
        found = []
        with self._lock:
            for key, (mark, guessed_bytes) in list(self._begun.items()):
                age_s = self._clock.age_s(mark)
                if age_s is not None:
                    del self._begun[key]
                    self._guessed_bytes -= guessed_bytes
                    found.append(Landed(key, None, age_s))
            self._begin_guesses()
        return found

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False without a copy under way.

        For the oldest that someone waits for, if there is one. A copy that has begun comes to an
        end.
        """
        with self._lock:
            self._begin_guesses()
            marks = sorted(self._begun.values(), key=lambda begun: begun[1] > 0)
        if not marks:
            return False
        self._clock.wait(marks[0][0])
        return True

    def forget(self) -> None:
        """Take back what has not begun and wait for what has; see BackgroundReader."""
        with self._lock:
            self._waiting.clear()
            self._clock.settle()
            self._begun.clear()
            self._guessed_bytes = 0

    def read_into(
        self, key: ExpertKey, buffer: Any, start: int = 0, length: int | None = None
    ) -> None:
        """Copy and wait for it; see RecordReader."""
        self._clock.wait(self._slots.fill(buffer, self._records.part(key, start, length), True))

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Copy all and wait for them; see BatchReader."""
        for one in requests:
            self.read_into(one.key, one.buffer, one.start, one.length)
        return [None] * len(requests)

    def close(self) -> None:
        """Wait for what is under way and give the records back."""
        self.forget()
        self._records.close()

    def _begin(self, request: Request) -> None:
        source = self._records.part(request.key, request.start, request.length)
        mark = self._slots.fill(request.buffer, source, request.urgent)
        guessed_bytes = 0
        if not request.urgent:
            guessed_bytes = request.length or self.record_bytes(request.key.layer)
        self._begun[request.key] = mark, guessed_bytes
        self._guessed_bytes += guessed_bytes

    def _begin_guesses(self) -> None:
        while self._waiting and self._guessed_bytes < self._ahead_bytes:
            self._begin(self._waiting.popleft())

    def _take_waiting(self, key: ExpertKey) -> Request | None:
        found = next((one for one in self._waiting if one.key == key), None)
        if found is not None:
            self._waiting.remove(found)
        return found
