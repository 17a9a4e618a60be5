"""Does guessing pay on this machine, with this model, now?

A guess costs time of its own (asking, reading what is not needed) and saves waiting. Which is more
depends on the disk, on the size of the experts and on what is resident, so it is measured: decode
steps run in short blocks, most at the level that is quickest, now and then one at another. A level
is how much is guessed: 0 nothing, 1 once per layer, 2 a second time just before the layer.

Machines change from one second to the next by more than guessing gains. So times of different
minutes are never compared: a block at another level is, with the blocks right before and after it.
Pure; callers hold the mover's lock.
"""

from __future__ import annotations

from collections import deque
from math import exp, log
from statistics import median

BLOCK_STEPS = 4  # the first of them still lives on what was read before: it does not count
TRIALS_COST = 0.003  # of the time, that trials of a level may take, as far as pauses allow it
SHORTEST_PAUSE, LONGEST_PAUSE = 6, 100  # blocks between trials of a level
REMEMBERED = 7  # trials of a level; their median counts: guesses learn, caches fill, texts change
CLOSE = 1.01  # a level that takes this much longer than the quickest, but guesses less, is taken
WORSE = 1.05  # a level that takes this much longer than the quickest is not worth adding to
_NAMES = ("without", "with early guesses", "with early and late guesses")
_TOO_CLOSE = ": too close to be worth the bytes"


class Benefit:
    """Times levels against each other."""

    def __init__(self, levels: int, is_fixed: bool = False) -> None:
        """Begin with the highest level.

        Args:
            levels: how many there are; 1: nothing is ever guessed.
            is_fixed: stay with the highest level, whether it pays or not.
        """
        self.levels, self.is_fixed = levels, is_fixed
        self._found = [deque[float](maxlen=REMEMBERED) for _ in range(levels)]
        self._found[0].append(0.0)
        self._steps: list[float] = []
        self._blocks: deque[tuple[int, float]] = deque(maxlen=3)  # level, seconds of a step
        # The cache fills while the first block runs; then every level is tried between others.
        others = [level for top in range(levels - 1, 0, -1) for level in (top, 0)]
        self._planned = deque([levels - 1, 0, *others])
        self._surprising: int | None = None  # the level that was tried last, if it was quicker
        self._now = 0  # blocks that have begun
        self._last = [0] * levels  # when each level was on
        self.level = 0
        self._begin_block()

    def end_step(self, seconds: float) -> None:
        """Take in how long a decode step took at the present level."""
        if self.levels == 1 or self.is_fixed:
            return
        self._steps.append(seconds)
        if len(self._steps) < BLOCK_STEPS:
            return
        self._blocks.append((self.level, median(self._steps[1:])))
        self._steps = []
        self._compare()
        if not self._planned:
            self._plan()
        self._begin_block()

    def describe(self) -> str:
        """Say for people what was found."""
        if self.levels == 1:
            return "nothing is guessed"
        state = ("off", "on", "on, twice per layer")[self.level]
        if self.is_fixed:
            return f"{state}; not asked whether it pays, since a window is set"
        if not all(self._found):
            return f"{state}; too few tokens to say whether it pays"
        last, last_s = self._blocks[-1]
        seconds = [last_s * exp(self._log(i) - self._log(last)) for i in range(self.levels)]
        ranked = sorted((t, i) for i, t in enumerate(seconds))
        times = ", ".join(f"{1e3 * t:.1f} ms {_NAMES[i]}" for t, i in ranked)
        # The present level need not be the first of these: say why.
        if self.level != self._quickest():
            return f"{state}, being tried; a token takes {times}"
        is_close = self.level != ranked[0][1]
        return f"{state}; a token takes {times}{_TOO_CLOSE if is_close else ''}"

    def _begin_block(self) -> None:
        self.level = self._planned.popleft()
        self._now += 1
        self._last[self.level] = self._now

    def _compare(self) -> None:
        """Learn from the last three blocks if the middle one was at another level."""
        if len(self._blocks) < 3:
            return
        (level, before_s), (tried, tried_s), (after, after_s) = self._blocks
        if after != level or tried == level or min(before_s, tried_s, after_s) <= 0:
            return
        longer = log(tried_s) - (log(before_s) + log(after_s)) / 2
        if tried == 0:  # all are known by what they take beside it
            self._found[level].append(-longer)
        else:
            self._found[tried].append(self._log(level) + longer)
        self._surprising = tried if longer < -log(CLOSE) else None

    def _plan(self) -> None:
        """Plan a pause at the quickest level and a trial of another, with a block after it."""
        best = self._quickest()
        due = {
            self._last[level] + self._pause(level, best): level
            for level in range(self.levels)
            if level != best and not self._adds_to_worse(level, best)
        }
        soonest = min(due)
        pause = max(1, soonest - self._now)
        self._planned.extend([*[best] * pause, due[soonest], best])

    def _pause(self, level: int, best: int) -> int:
        """Return after how many blocks a level is to be tried again: the later the worse it is."""
        if level == self._surprising:
            return SHORTEST_PAUSE
        longer = self._log(level) - self._log(best)
        return int(min(max(longer / TRIALS_COST, SHORTEST_PAUSE), LONGEST_PAUSE))

    def _adds_to_worse(self, level: int, best: int) -> bool:
        """Say whether a level only adds guesses to one that takes clearly longer than the best."""
        return best < level - 1 and self._log(level - 1) - self._log(best) > log(WORSE)

    def _log(self, level: int) -> float:
        """Return the logarithm of what a step takes, over what it takes at level 0."""
        return median(self._found[level]) if self._found[level] else 0.0

    def _quickest(self) -> int:
        known = [level for level in range(self.levels) if self._found[level]]
        most = min(self._log(level) for level in known) + log(CLOSE)
        return next(level for level in known if self._log(level) <= most)
