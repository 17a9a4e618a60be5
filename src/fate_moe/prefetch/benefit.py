"""Does guessing pay on this machine, with this model, now?

A guess costs time of its own (asking, reading what is not needed) and saves waiting. Which is more
depends on the disk, on the size of the experts and on what is resident, so it is measured: decode
steps run in blocks, most at the level that was quickest so far, now and then some at another one. A
level is how much is guessed: 0 nothing, 1 once per layer, 2 a second time just before the layer.
Pure; callers hold the mover's lock.
"""

from __future__ import annotations

from statistics import median

TRIAL_STEPS = 4  # the first of them still lives on what was read before: it does not count
FIRST_LONG_STEPS = 24  # twice as many each time, while the cache still fills and guesses learn
LONG_STEPS = 96
NEWEST = 0.75  # what the newest block weighs: guesses learn, caches fill, machines change
CLOSE = 1.005  # a level that takes this much longer than the quickest, but guesses less, is taken
_NAMES = ("without", "with early guesses", "with early and late guesses")
_TOO_CLOSE = ": too close to be worth the bytes"


class Benefit:
    """Times levels against each other."""

    def __init__(self, levels: int) -> None:
        """Begin with the highest level.

        Args:
            levels: how many there are; 1: nothing is ever guessed.
        """
        self.levels = levels
        self._seconds: list[float | None] = [None] * levels
        self._block: list[float] = []
        # The cache fills while the first blocks run: the highest level is tried again at the end.
        self._trials = [*reversed(range(levels)), levels - 1] if levels > 1 else []
        self._next = 0
        self._long_steps = FIRST_LONG_STEPS
        self.level = 0
        self._left = 0
        self._go_on()

    def end_step(self, seconds: float) -> None:
        """Take in how long a decode step took at the present level."""
        if len(self._seconds) == 1:
            return
        self._block.append(seconds)
        self._left -= 1
        if self._left:
            return
        found, before = median(self._block[1:]), self._seconds[self.level]
        self._seconds[self.level] = (
            found if before is None else NEWEST * found + (1 - NEWEST) * before
        )
        was_long = len(self._block) > TRIAL_STEPS
        self._block = []
        if was_long:
            self._trials = [self._another()]
        self._go_on()

    def describe(self) -> str:
        """Say for people what was found."""
        known = [(t, i) for i, t in enumerate(self._seconds) if t is not None]
        if len(self._seconds) == 1:
            return "nothing is guessed"
        state = ("off", "on", "on, twice per layer")[self.level]
        if len(known) < len(self._seconds):
            return f"{state}; too few tokens to say whether it pays"
        ranked = sorted(known)
        times = ", ".join(f"{1e3 * t:.1f} ms {_NAMES[i]}" for t, i in ranked)
        # The present level need not be the first of these: say why.
        if self.level != self._quickest():
            return f"{state}, being tried; a token takes {times}"
        is_close = self.level != ranked[0][1]
        return f"{state}; a token takes {times}{_TOO_CLOSE if is_close else ''}"

    def _go_on(self) -> None:
        if self._trials:
            self.level, self._left = self._trials.pop(0), TRIAL_STEPS
        else:
            self.level, self._left = self._quickest(), self._long_steps
            self._long_steps = min(2 * self._long_steps, LONG_STEPS)

    def _quickest(self) -> int:
        known = [t for t in self._seconds if t is not None]
        if not known:
            return 0
        most = CLOSE * min(known)
        return next(i for i, t in enumerate(self._seconds) if t is not None and t <= most)

    def _another(self) -> int:
        levels = len(self._seconds)
        self._next = (self._next + 1) % levels
        if self._next == self.level:
            self._next = (self._next + 1) % levels
        return self._next
