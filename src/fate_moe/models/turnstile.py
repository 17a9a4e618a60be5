"""Who may use memory that one call begins with and a later one ends with?

One thread at a time; others wait. An interrupt may come before a thread has left: it is let in
again, and leaves for good the next time that it computes.
"""

from __future__ import annotations

import threading

from fate_moe.errors import CacheError

PATIENCE_S = 600.0
"""Whoever is inside may read a whole token's experts from a slow disk; it gives up by itself when
nothing comes in."""


class Turnstile:
    """Lets one thread in at a time."""

    def __init__(self) -> None:
        # The interpreter notes in one step with the lock whose it is: no interrupt comes between.
        self._lock = threading.RLock()

    def enter(self) -> None:
        """Wait until nobody else is inside.

        Raises:
            CacheError: somebody has been for ten minutes.
        """
        if not self._lock.acquire(timeout=PATIENCE_S):
            raise CacheError(f"another thread has been computing for over {PATIENCE_S:.0f} s")

    def leave(self) -> None:
        """Let the next one in, however often this thread came in; nothing if it is not inside."""
        try:
            while True:
                self._lock.release()
        except RuntimeError:
            pass  # it is not ours, or no longer
