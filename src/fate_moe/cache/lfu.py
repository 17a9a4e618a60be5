"""Least frequently used: who was asked for least often since it came goes first."""

from __future__ import annotations

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey


class LFU(EvictionPolicy):
    """Count the requests of residents; among equals the one that reached its count first goes.

    Cost: O(1) a request: residents lie in one list per count. An eviction looks for the lowest
    count that has any. Source: Shah, Mitra and Matani, "An O(1) algorithm for implementing the
    LFU cache eviction scheme", 2010.
    """

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self._count: dict[ExpertKey, int] = {}
        self._with: dict[int, dict[ExpertKey, None]] = {}  # count -> keys, oldest first

    def hit(self, key: ExpertKey) -> None:
        count = self._count[key]
        self._take_out(key, count)
        self._put_in(key, count + 1)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        for count in sorted(self._with):
            for old in self._with[count]:
                if evictable(old):
                    return old
        return None

    def evict(self, key: ExpertKey) -> None:
        self._take_out(key, self._count.pop(key))

    def admit(self, key: ExpertKey) -> None:
        self._put_in(key, 1)

    def forget(self, key: ExpertKey) -> None:
        self.evict(key)

    def _put_in(self, key: ExpertKey, count: int) -> None:
        self._count[key] = count
        self._with.setdefault(count, {})[key] = None

    def _take_out(self, key: ExpertKey, count: int) -> None:
        keys = self._with[count]
        del keys[key]
        if not keys:
            del self._with[count]
