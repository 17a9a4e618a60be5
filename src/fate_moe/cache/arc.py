"""Adaptive replacement cache: the paper's policy, one instance per layer.

Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003,
figure 4; used per layer by Fate (arXiv 2502.12224). Differs from the Fate authors' code, which
moves the target by whole list lengths; here it moves by the ratio of the ghost lists, as in the
original. Differs from the original only where the chosen expert is locked by a lease: the next
oldest that may go is taken instead, first of the same list, then of the other.
"""

from __future__ import annotations

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey

_List = dict[ExpertKey, None]  # oldest first


class ARC(EvictionPolicy):
    """Balance recency (T1) against frequency (T2) by what the ghosts (B1, B2) say. O(1) a request.

    Invariants: |T1| + |T2| <= c, |T1| + |B1| <= c, all four together <= 2c, 0 <= p <= c.
    """

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self.target: float = 0.0  # p: how many slots recency deserves
        self._t1: _List = {}
        self._t2: _List = {}
        self._b1: _List = {}
        self._b2: _List = {}

    def hit(self, key: ExpertKey) -> None:
        (self._t1 if key in self._t1 else self._t2).pop(key)
        self._t2[key] = None

    def miss(self, key: ExpertKey) -> None:
        if key in self._b1:
            step = max(len(self._b2) / len(self._b1), 1.0)
            self.target = min(float(self.capacity_slots), self.target + step)
        elif key in self._b2:
            step = max(len(self._b1) / len(self._b2), 1.0)
            self.target = max(0.0, self.target - step)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        size = len(self._t1)
        recency_gives = size > self.target or (key in self._b2 and size == self.target)
        first, second = (self._t1, self._t2) if recency_gives else (self._t2, self._t1)
        for entries in (first, second):
            for old in entries:
                if evictable(old):
                    return old
        return None

    def evict(self, key: ExpertKey) -> None:
        source, ghost = (self._t1, self._b1) if key in self._t1 else (self._t2, self._b2)
        del source[key]
        ghost[key] = None

    def admit(self, key: ExpertKey) -> None:
        seen_before = key in self._b1 or key in self._b2
        self._b1.pop(key, None)
        self._b2.pop(key, None)
        if seen_before:
            self._t2[key] = None
            return
        self._trim_ghosts()
        self._t1[key] = None

    def forget(self, key: ExpertKey) -> None:
        (self._t1 if key in self._t1 else self._t2).pop(key)

    def _trim_ghosts(self) -> None:
        # Make room for one newcomer in |T1|+|B1| <= c and in the directory of 2c; the paper does
        # this before the eviction, which removes the same ghosts.
        if self._b1 and len(self._t1) + len(self._b1) >= self.capacity_slots:
            del self._b1[next(iter(self._b1))]
        total = len(self._t1) + len(self._t2) + len(self._b1) + len(self._b2)
        if self._b2 and total >= 2 * self.capacity_slots:
            del self._b2[next(iter(self._b2))]
