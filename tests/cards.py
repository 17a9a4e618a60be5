"""A device that is none: copies arrive late and out of order, and misuse is found."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fate_moe.memory import Arena

_LOCK = threading.RLock()  # any thread may wait


@dataclass(eq=False)
class FakeMark:
    """A point in the fake device's work."""

    run: Callable[[], object] = lambda: None
    needs: list["FakeMark"] = field(default_factory=list)
    done: bool = False

    def pass_(self) -> None:
        """Do what comes before it, then it."""
        with _LOCK:
            self._pass()

    def _pass(self) -> None:
        left = [self]
        while left:
            open_needs = [need for need in left[-1].needs if not need.done]
            left.extend(open_needs)
            if not open_needs:
                mark = left.pop()
                if not mark.done:
                    mark.done = True
                    mark.run()


class FakeCard:
    """A Card to the host's own memory: a copy is done when it is waited for, or by chance.

    Until then its target is full of 255s. Each stream keeps its order, the two do not keep step.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, chance: float = 0.3) -> None:
        self.copies = 0
        self.urgent_copies = 0
        self.pinned: list[Arena] = []
        self._random = random.Random(seed)
        self._chance = chance
        self._last: dict[bool, FakeMark | None] = {True: None, False: None}

    def copy(
        self, source: Tensor, target: Tensor, after: FakeMark | None, urgent: bool
    ) -> FakeMark:
        self.copies += 1
        self.urgent_copies += urgent
        begun = FakeMark(lambda: target.fill_(255), [after] if after else [])
        before = self._last[urgent]
        mark = FakeMark(lambda: target.copy_(source), [begun, *([before] if before else [])])
        if after is None:
            begun.pass_()
        self._last[urgent] = mark
        return mark

    def now(self) -> FakeMark:
        mark = FakeMark()
        mark.pass_()  # this device computes while it is told to
        return mark

    def settle(self) -> None:
        for mark in self._last.values():
            if mark is not None:
                mark.pass_()

    def age_s(self, mark: FakeMark) -> float | None:
        if not mark.done and self._random.random() < self._chance:
            mark.pass_()
        return 0.0 if mark.done else None

    def wait(self, mark: FakeMark) -> None:
        mark.pass_()

    def pin(self, arena: Arena) -> None:
        self.pinned.append(arena)

    def unpin(self, arena: Arena) -> None:
        self.pinned.remove(arena)

    def free_bytes(self) -> int:
        return 8 << 30

    def peak_bytes(self) -> int:
        return 0
