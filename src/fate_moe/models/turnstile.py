"""Who may use memory that one call begins with and a later one ends with?

One thread at a time; others wait. An interrupt may come before a thread has left: it is let in
again, and leaves for good the next time, so nobody is kept out by it for long.
"""

from __future__ import annotations

import threading

from fate_moe.errors import CacheError
from fate_moe.prefetch.lease import POLL_S


class Turnstile:
    """Lets one thread in at a time."""

    def __init__(self) -> None:
        # The interpreter notes in one step with the lock whose it is: no interrupt comes between.
        self._lock = threading.RLock()

    def enter(self) -> None:
        """Wait until nobody else is inside.

        Raises:
            CacheError: somebody has been for a minute.
        """
        if not self._lock.acquire(timeout=POLL_S):
            raise CacheError(f"another thread has been computing for over {POLL_S:.0f} s")

    def leave(self) -> None:
        """Let the next one in, however often this thread came in; nothing if it is not inside."""
        try:
            while True:
                self._lock.release()
        except RuntimeError:
            pass  # it is not ours, or no longer
