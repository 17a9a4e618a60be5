"""Least frequently and recently used: a count that weighs less the longer ago it was added to."""

from __future__ import annotations

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey


class LFRU(EvictionPolicy):
    """Evict the lowest (requests since it came) / (requests to the region since its last one).

    Cost: O(1) a request; an eviction looks at every resident once. Source: the rule that expert
    caches call LFRU (vLLM, pull request 37190).
    """

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self._now = 0
        self._count: dict[ExpertKey, int] = {}
        self._last: dict[ExpertKey, int] = {}

    def hit(self, key: ExpertKey) -> None:
        self._now += 1
        self._count[key] += 1
        self._last[key] = self._now

    def miss(self, key: ExpertKey) -> None:
        self._now += 1

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        now, last = self._now + 1, self._last
        worth = {old: count / (now - last[old]) for old, count in self._count.items()}
        least = min(worth, key=worth.__getitem__, default=None)
        if least is None or evictable(least):
            return least
        return next((old for old in sorted(worth, key=worth.__getitem__) if evictable(old)), None)

    def evict(self, key: ExpertKey) -> None:
        del self._count[key], self._last[key]

    def admit(self, key: ExpertKey) -> None:
        self._count[key] = 1
        self._last[key] = self._now

    def forget(self, key: ExpertKey) -> None:
        self.evict(key)
