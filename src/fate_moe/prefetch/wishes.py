"""Which guessed experts are still to be read, and are they worth it?

As many as the window has room for, most likely first; beyond that, those that are sure enough.
Pure; callers hold the mover's lock.
"""

from __future__ import annotations

from collections import deque

from fate_moe.prefetch.sureness import Sureness
from fate_moe.types import ExpertKey, Prediction


class Wishes:
    """Experts guessed for the layer that comes next, without a slot so far."""

    def __init__(self) -> None:
        self.sureness = Sureness()
        self._waiting: deque[tuple[int, ExpertKey]] = deque()  # with their ranks
        self._left = 0  # of the window
        self._least_chance = 2.0

    def open(self, window: int, least_chance: float) -> None:
        """Begin with a new window; a guess beyond it needs that chance of being right."""
        self._left, self._least_chance = window, least_chance

    def add(self, guess: Prediction) -> None:
        """Wish for what was guessed."""
        layer = guess.layer
        self._waiting.extend((rank, ExpertKey(layer, e)) for rank, e in enumerate(guess.ranked))

    def first(self) -> ExpertKey | None:
        """Return the next expert that is worth its read."""
        while self._waiting:
            rank, key = self._waiting[0]
            if self._left > 0 or self.sureness.chance(rank) >= self._least_chance:
                return key
            self._waiting.popleft()
        return None

    def pop(self) -> None:
        """Be done with the first one."""
        self._waiting.popleft()

    def spend(self) -> None:
        """Take a read from the window."""
        self._left -= 1

    def give_back(self) -> None:
        """Return a read to the window that was taken back."""
        self._left += 1

    def clear(self) -> None:
        """Wish for nothing."""
        self._waiting.clear()
