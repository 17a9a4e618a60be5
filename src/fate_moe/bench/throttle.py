"""What if the link were slower? A reader that takes its time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from fate_moe.errors import ReadError
from fate_moe.store.background import Landed
from fate_moe.store.reader import TOGETHER_BYTES, BackgroundReader, Mode, RecordReader, Request
from fate_moe.types import ExpertKey

_AHEAD_S = 2e-4  # reads in the background begin this early: a disk has its next ones queued too


class ThrottledReader:
    """A reader that passes on what another one reads, at most `bytes_s` bytes a second.

    All reads share the rate, one after the other, as on one link; reads themselves overlap. Those
    in the background wait here for their turn, so that they can be withdrawn until it comes.
    """

    def __init__(self, inner: RecordReader, bytes_s: float) -> None:
        self._inner: Any = inner  # what it can do beyond a RecordReader, this one can
        self._bytes_s = bytes_s
        self._lock = threading.RLock()
        self._free_s = 0.0  # when the link is free again
        self._waiting: deque[tuple[Request, float]] = deque()  # and when it was asked for
        self._until_s: dict[ExpertKey, float] = {}  # begun in the background: when it is through
        self._landed: dict[ExpertKey, ReadError | None] = {}

    @property
    def mode(self) -> Mode:
        """As of the reader inside."""
        mode: Mode = self._inner.mode
        return mode

    @property
    def any_size(self) -> bool:
        """As of the reader inside; one that reads only while its caller waits has none."""
        return getattr(self._inner, "any_size", False)

    @property
    def batch_bytes(self) -> int:
        """As of the reader inside; see `any_size`."""
        return getattr(self._inner, "batch_bytes", 0)

    def record_bytes(self, layer: int) -> int:
        """As of the reader inside."""
        return int(self._inner.record_bytes(layer))

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        """Read, and return when the link would have delivered."""
        until_s = self._take(Request(key, buffer, start, length))
        self._inner.read_into(key, buffer, start, length)
        _sleep_until(until_s)

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Read, and return when the link would have delivered all."""
        until_s = self._take(*requests)
        found: list[ReadError | None] = self._inner.read_many(requests)
        _sleep_until(until_s)
        return found

    def start(self, requests: Sequence[Request]) -> None:
        """Begin reads as soon as the link is free for them."""
        with self._lock:
            now_s = time.perf_counter()
            self._waiting.extend((request, now_s) for request in requests)
            self._begin_due()

    def promote(self, key: ExpertKey) -> None:
        """Pass on that someone waits for a read; here each waits for its turn."""
        with self._lock:
            if key in self._until_s:
                self._inner.promote(key)

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a read back for which the link has not been free so far."""
        with self._lock:
            self._begin_due()
            for place, (request, _) in enumerate(self._waiting):
                if request.key == key:
                    del self._waiting[place]
                    return True
            return False

    def landed(self) -> list[Landed]:
        """Return what the link would have delivered since the last call."""
        with self._lock:
            self._begin_due()
            self._landed.update((one.key, one.failure) for one in self._inner.landed())
            now_s = time.perf_counter()
            through = [key for key in self._landed if self._until_s[key] <= now_s]
            return [
                Landed(key, self._landed.pop(key), now_s - self._until_s.pop(key))
                for key in through
            ]

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s` or without a read."""
        end_s = time.perf_counter() + most_s
        while time.perf_counter() < end_s:
            with self._lock:
                self._begin_due()
                self._landed.update((one.key, one.failure) for one in self._inner.landed())
                until_s = min((self._until_s[key] for key in self._landed), default=None)
                if until_s is None and not self._until_s and not self._waiting:
                    return False
            if until_s is not None:
                _sleep_until(until_s)
                return True
            if self._until_s:
                self._inner.wait(end_s - time.perf_counter())
            else:
                _sleep_until(self._free_s - _AHEAD_S)
        return False

    def forget(self) -> None:
        """Take back what has not begun and wait for what has."""
        with self._lock:
            self._waiting.clear()
            if isinstance(self._inner, BackgroundReader):
                self._inner.forget()
            self._until_s.clear()
            self._landed.clear()

    def close(self) -> None:
        """Close the reader inside."""
        self.forget()
        self._inner.close()

    def _take(self, *requests: Request) -> float:
        """Claim the link for some requests; return when they are through."""
        with self._lock:
            self._begin_due()
            self._free_s = max(self._free_s, time.perf_counter())
            self._free_s += sum(map(self._seconds, requests))
            return self._free_s

    def _begin_due(self) -> None:
        """Begin the reads in the background whose turn has come."""
        if not self._waiting:
            return
        soon_s = time.perf_counter() + _AHEAD_S
        due: list[Request] = []
        together = 0.0
        while self._waiting:
            request, asked_s = self._waiting[0]
            begins_s, takes_s = max(self._free_s, asked_s), self._seconds(request)
            together += takes_s
            # What a reader without a brake would ask its disk for at once goes at once.
            if begins_s > soon_s and not (due and together <= TOGETHER_BYTES / self._bytes_s):
                break
            self._free_s = self._until_s[request.key] = begins_s + takes_s
            due.append(request)
            self._waiting.popleft()
        if due:
            self._inner.start(due)

    def _seconds(self, one: Request) -> float:
        size = self.record_bytes(one.key.layer) - one.start if one.length is None else one.length
        return size / self._bytes_s


def _sleep_until(until_s: float) -> None:
    left_s = until_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)
