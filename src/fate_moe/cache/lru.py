"""Least recently used: the yardstick of every other policy."""

from __future__ import annotations

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey


class LRU(EvictionPolicy):
    """Evict the expert asked for longest ago. Cost: O(1) a request."""

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self._order: dict[ExpertKey, None] = {}  # oldest first

    def hit(self, key: ExpertKey) -> None:
        del self._order[key]
        self._order[key] = None

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        return next((old for old in self._order if evictable(old)), None)

    def evict(self, key: ExpertKey) -> None:
        del self._order[key]

    def admit(self, key: ExpertKey) -> None:
        self._order[key] = None

    def forget(self, key: ExpertKey) -> None:
        del self._order[key]
