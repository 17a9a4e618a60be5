"""Who reads while nobody waits for it?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fate_moe.cache.table import Entry

Take = Callable[[], list[Entry]]
Fill = Callable[[Sequence[Entry]], Sequence[Exception | None]]
End = Callable[[Sequence[Entry], Sequence[Exception | None]], None]


class ReaderThreads:
    """Threads that take reads and do them, until closed."""

    def __init__(
        self,
        count: int,
        lock: threading.RLock,
        take: Take,
        fill: Fill,
        end: End,
    ) -> None:
        """Start them.

        Args:
            count: how many reads run side by side.
            lock: held while `take` and `end` are called.
            take: gives what to read next; empty: nothing, until `wake`.
            fill: reads; says what went wrong with each.
            end: is told so.
        """
        self.reading = 0  # threads that fill slots
        self._queued = threading.Condition(lock)
        self._closed = False
        self._threads = [
            # Whose methods these are goes with its last user, not only with the collector.
            threading.Thread(
                target=self._loop, args=(take, fill, end), name=f"fate-reader-{i}", daemon=True
            )
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Let one of them look for work; under the lock."""
        self._queued.notify()

    def close(self) -> None:
        """Stop them; not under the lock, unless by one of them."""
        with self._queued:
            self._closed = True
            self._queued.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the collector runs on any thread
                thread.join()

    def _loop(self, take: Take, fill: Fill, end: End) -> None:
        while True:
            with self._queued:
                while not self._closed and not (batch := take()):
                    self._queued.wait()
                if self._closed:
                    return
                self.reading += 1
            failures = fill(batch)
            with self._queued:
                self.reading -= 1
                end(batch, failures)
