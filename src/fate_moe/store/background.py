"""Which reads go on while their caller does something else?

The reading itself is the native core's (csrc/courier.h): a thread that never waits for the
interpreter. It keeps the requests, and with them their memory; here is what came of each.
One thread at a time may call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fate_moe.errors import ReadError
from fate_moe.types import ExpertKey

if TYPE_CHECKING:
    from fate_moe.store.reader import Request


class Landed(NamedTuple):
    """What came of one read.

    Attributes:
        key: which record.
        failure: why it did not come in, or None.
        ago_s: seconds since.
    """

    key: ExpertKey
    failure: ReadError | None
    ago_s: float = 0.0


class Background:
    """Reads under way, at most one of each record."""

    def __init__(
        self, courier: Any, finish: Callable[[Request, int], None], finishes_all: bool
    ) -> None:
        """Start with none.

        Args:
            courier: the native core's.
            finish: reads the last bytes, so many, of a request that did not come in; raises
                ReadError. Also of one that the courier could not begin.
            finishes_all: call it for every read, also where nothing is missing.
        """
        self._courier = courier
        self._finish = finish
        self._finishes_all = finishes_all
        self._refused: list[Landed] = []

    def start(self, requests: Sequence[Request]) -> None:
        """Begin reads; returns at once."""
        for request in self._courier.start(requests):
            self._refused.append(self._finished(request, -1, 0.0))

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a read back that has not begun; False when it has, or there is none."""
        return bool(self._courier.withdraw(*key))

    def landed(self) -> list[Landed]:
        """Return what came in, or failed, since the last call."""
        found, self._refused = self._refused, []
        for request, missing, ago_s in self._courier.landed():
            if missing or self._finishes_all:
                found.append(self._finished(request, missing, ago_s))
            else:
                found.append(Landed(request.key, None, ago_s))
        return found

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s` or without a read."""
        return bool(self._refused) or bool(self._courier.wait(most_s))

    def read_buffered(self, layer: int) -> None:
        """Begin no more direct reads of a layer."""
        self._courier.buffer(layer)

    def forget(self) -> None:
        """Take back what has not begun and wait for what has; `landed` reports none of it."""
        self._courier.forget()
        self._refused.clear()

    def close(self) -> None:
        """Forget all and begin nothing more: the files may be closed."""
        self._courier.close()
        self._refused.clear()

    def _finished(self, request: Request, missing: int, ago_s: float) -> Landed:
        try:
            self._finish(request, missing)
        except ReadError as error:
            return Landed(request.key, error, ago_s)
        return Landed(request.key, None, ago_s)
