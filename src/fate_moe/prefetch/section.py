"""Was a change of the table left half-way?"""

from __future__ import annotations

from typing import Protocol


class _Lock(Protocol):
    def acquire(self) -> bool: ...

    def release(self) -> None: ...


class Section:
    """Holds a lock; an exception that leaves `with section:` half-way marks the table as torn.

    A generator would cost more than what it guards. Whoever waits inside lets others in, who are
    out again before the wait is over, so one stack serves all.

    Attributes:
        torn: whether the table can no longer be trusted and the next lease starts it anew; true
            inside a section until it ends well.
    """

    def __init__(self, lock: _Lock) -> None:
        self._lock = lock
        self._before: list[bool] = []
        self.torn = False

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before.append(self.torn)
        self.torn = True

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        before = self._before.pop()
        self.torn = before if kind is None else True
        self._lock.release()
