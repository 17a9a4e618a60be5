"""Three simple queues: newcomers prove themselves in a small one before they reach the main one.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.
Differs where the chosen expert is locked by a lease: it is passed over, as if it were not there.
"""

from __future__ import annotations

from itertools import chain

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey

_MOST = 3  # requests that are counted
_SMALL_SHARE = 0.1


class S3FIFO(EvictionPolicy):
    """Small queue (a tenth), main queue, and a ghost queue of keys that left the small one.

    Cost: O(1) a request, amortized: an entry that is passed over loses one of at most three lives.
    """

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self._small_slots = max(1, int(_SMALL_SHARE * capacity_slots))
        self._small: dict[ExpertKey, int] = {}  # requests since it came, oldest first
        self._main: dict[ExpertKey, int] = {}
        self._ghosts: dict[ExpertKey, None] = {}

    def hit(self, key: ExpertKey) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(_MOST, queue[key] + 1)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        if self._newcomers_give():
            for old, count in self._small.items():
                if count <= 1 and evictable(old):
                    return old
        # Every round takes a life: the first with the fewest goes, after those that would come
        # over from the small queue with none.
        promoted = ((old, 0) for old, count in self._small.items() if count > 1)
        coming = promoted if self._newcomers_give() else iter(())
        best: ExpertKey | None = None
        fewest = _MOST + 1
        for old, count in chain(self._main.items(), coming):
            if count < fewest and evictable(old):
                best, fewest = old, count
        if best is None:
            best = next((old for old in self._small if evictable(old)), None)
        return best

    def evict(self, key: ExpertKey) -> None:
        if key in self._small and self._small[key] <= 1:
            if self._newcomers_give():
                self._promote_before(key)
            del self._small[key]
            self._remember(key)
            return
        if self._newcomers_give():
            self._promote_before(None)
        if key in self._small:  # the last resort: every other one is locked
            del self._small[key]
            return
        rounds = self._main[key]
        for old in self._main:
            self._main[old] = max(0, self._main[old] - rounds)
        for old in list(self._main):
            if old == key:
                break
            self._main[old] = max(0, self._main.pop(old) - 1)
        del self._main[key]

    def admit(self, key: ExpertKey) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def forget(self, key: ExpertKey) -> None:
        (self._small if key in self._small else self._main).pop(key)

    def _newcomers_give(self) -> bool:
        return len(self._small) >= self._small_slots

    def _promote_before(self, key: ExpertKey | None) -> None:
        for old in list(self._small):
            if old == key:
                return
            if self._small[old] > 1:
                del self._small[old]
                self._main[old] = 0

    def _remember(self, key: ExpertKey) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > max(1, self.capacity_slots - self._small_slots):
            del self._ghosts[next(iter(self._ghosts))]
