"""Which reads go on while their caller does something else?

A place for each that is under way, a file kept open for it, and what came of it. The reading
itself is the native core's (csrc/courier.h): a thread that never waits for the interpreter.
One thread at a time may call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fate_moe.errors import ReadError
from fate_moe.store.layer_file import LayerFile
from fate_moe.types import ExpertKey


class Place(NamedTuple):
    """Where the bytes of one read are, and where they go."""

    key: ExpertKey
    file: LayerFile
    offset: int  # in the file
    target: memoryview
    address: int  # of the target


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

    def __init__(self, courier: Any, finish: Callable[[Place, int], None]) -> None:
        """Start with none.

        Args:
            courier: the native core's.
            finish: reads what is missing after the first bytes of a place; raises ReadError.
        """
        self._courier = courier
        self._finish = finish
        self._places: dict[int, Place] = {}
        self._refused: list[Landed] = []

    def start(self, places: Sequence[Place]) -> None:
        """Begin reads; returns at once."""
        asked = []
        for place in places:
            length = len(place.target)
            fd = place.file.hold(place.offset, place.address, length)
            if fd < 0:
                self.refuse(place.key, ReadError(
                    place.key, place.file.path, place.offset, None, "the store is closed"
                ))  # fmt: skip
                continue
            ticket = _ticket(place.key)
            self._places[ticket] = place
            asked.append((ticket, fd, place.offset, place.address, length))
        if asked:
            self._courier.start(asked)

    def refuse(self, key: ExpertKey, why: ReadError) -> None:
        """Have `landed` say that a read could not begin."""
        self._refused.append(Landed(key, why))

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a read back that has not begun; False when it has, or there is none."""
        ticket = _ticket(key)
        if ticket not in self._places or not self._courier.withdraw(ticket):
            return False
        self._places.pop(ticket).file.let_go()
        return True

    def landed(self) -> list[Landed]:
        """Return what came in, or failed, since the last call."""
        found, self._refused = self._refused, []
        for ticket, done, _, ago_s in self._courier.landed():
            place, failure = self._places.pop(ticket), None
            try:
                self._finish(place, done)
            except ReadError as error:
                failure = error
            finally:
                place.file.let_go()
            found.append(Landed(place.key, failure, ago_s))
        return found

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s` or without a read."""
        return bool(self._refused) or bool(self._courier.wait(most_s))

    def forget(self) -> None:
        """Take back what has not begun and wait for what has; `landed` reports none of it."""
        self._courier.drain()
        self._courier.landed()
        self._refused.clear()
        for place in self._places.values():
            place.file.let_go()
        self._places.clear()


def _ticket(key: ExpertKey) -> int:
    return key.layer << 32 | key.expert
