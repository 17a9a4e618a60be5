"""Least recently used, but never what is guessed for the layer that comes next.

Matters where layers share a region: there a demand of one layer may push out what the next one is
about to ask for. Source: prediction-aware eviction, as in Pre-gated MoE (arXiv 2308.12066), where
what was fetched ahead stays until it was used.
"""

from __future__ import annotations

from fate_moe.cache.lru import LRU
from fate_moe.cache.policy import Evictable
from fate_moe.types import ExpertKey, Prediction


class Guarded(LRU):
    """Evict the expert asked for longest ago that nobody guesses; if all are guessed, the oldest.

    Cost: O(1) a request, beside the guessed entries it skips.
    """

    def __init__(self, capacity_slots: int) -> None:
        super().__init__(capacity_slots)
        self._expected: frozenset[ExpertKey] = frozenset()

    def expect(self, prediction: Prediction) -> None:
        layer = prediction.layer
        self._expected = frozenset(ExpertKey(layer, expert) for expert in prediction.ranked)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        expected = self._expected
        first = super().victim(key, lambda old: old not in expected and evictable(old))
        return super().victim(key, evictable) if first is None else first
