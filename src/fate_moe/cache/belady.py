"""The best that any policy could do, for who knows the future: the bound, in the simulator only.

Source: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import ExpertKey

_NEVER = 1 << 62


class Belady(EvictionPolicy):
    """Evict the expert whose next request is farthest away.

    Cost: O(log c) a request.
    """

    def __init__(self, capacity_slots: int, future: Mapping[ExpertKey, Sequence[int]]) -> None:
        """Know the future.

        Args:
            future: when each expert will be asked for, ascending; any unit, one for all.
        """
        self.capacity_slots = capacity_slots
        self._coming = {key: iter(times) for key, times in future.items()}
        self._next: dict[ExpertKey, int] = {}  # of every expert asked for so far
        self._farthest: list[tuple[int, ExpertKey]] = []  # (-next, key); some are out of date
        self._resident: set[ExpertKey] = set()
        for key in future:
            self._advance(key)

    def hit(self, key: ExpertKey) -> None:
        self._advance(key)
        heapq.heappush(self._farthest, (-self._next[key], key))

    def miss(self, key: ExpertKey) -> None:
        self._advance(key)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        locked: list[tuple[int, ExpertKey]] = []
        best = None
        while self._farthest:
            when, old = self._farthest[0]
            is_current = old in self._resident and self._next[old] == -when
            if is_current and evictable(old):
                best = old
                break
            heapq.heappop(self._farthest)
            if is_current:
                locked.append((when, old))
        for entry in locked:
            heapq.heappush(self._farthest, entry)
        return best

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        return self._next[key] <= self._next[victim]

    def evict(self, key: ExpertKey) -> None:
        self._resident.remove(key)

    def admit(self, key: ExpertKey) -> None:
        self._resident.add(key)
        heapq.heappush(self._farthest, (-self._next[key], key))

    def forget(self, key: ExpertKey) -> None:
        self._resident.remove(key)

    def _advance(self, key: ExpertKey) -> None:
        self._next[key] = next(self._coming[key], _NEVER)
