"""What if the link were slower? A reader that takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from fate_moe.errors import ReadError
from fate_moe.store.reader import BatchReader, Mode, Request
from fate_moe.types import ExpertKey


class ThrottledReader:
    """A BatchReader that passes on what another one reads, at most `bytes_s` bytes a second.

    All reads share the rate, one after the other, as on one link; reads themselves overlap.
    """

    def __init__(self, inner: BatchReader, bytes_s: float) -> None:
        self._inner = inner
        self._bytes_s = bytes_s
        self._lock = threading.Lock()
        self._free_s = 0.0  # when the link is free again

    @property
    def mode(self) -> Mode:
        """As of the reader inside."""
        return self._inner.mode

    @property
    def batch_bytes(self) -> int:
        """As of the reader inside."""
        return self._inner.batch_bytes

    def record_bytes(self, layer: int) -> int:
        """As of the reader inside."""
        return self._inner.record_bytes(layer)

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
        found = self._inner.read_many(requests)
        _sleep_until(until_s)
        return found

    def close(self) -> None:
        """Close the reader inside."""
        self._inner.close()

    def _take(self, *requests: Request) -> float:
        """Claim the link for some requests; return when they are through."""
        size = sum(
            self.record_bytes(one.key.layer) - one.start if one.length is None else one.length
            for one in requests
        )
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + size / self._bytes_s
            return self._free_s


def _sleep_until(until_s: float) -> None:
    left_s = until_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)
