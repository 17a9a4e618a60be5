"""What must an eviction policy do, and which ones are there?

A policy orders the resident experts of one region (the slots that share one fate; the default is
one region per MoE layer). It holds no bytes and no slots; the table owns those and tells the
policy what happened. A policy never sees a guess: only what the router chose.

One request for `key` is, in this order:
    resident:      hit(key)
    not resident:  miss(key), then, where the region is full, victim(key, evictable) and
                   evict(victim), then admit(key)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

from fate_moe.errors import ConfigError
from fate_moe.types import ExpertKey

Evictable = Callable[[ExpertKey], bool]


class EvictionPolicy(Protocol):
    """The verbs every policy file implements; each is O(1) beside the locked entries it skips."""

    def hit(self, key: ExpertKey) -> None:
        """Learn that a resident expert was asked for."""

    def miss(self, key: ExpertKey) -> None:
        """Learn that an expert that is not resident was asked for."""

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        """Choose who makes room for `key`; None when nothing is evictable. Changes nothing."""

    def evict(self, key: ExpertKey) -> None:
        """Learn that `key` left the region."""

    def admit(self, key: ExpertKey) -> None:
        """Learn that `key`, asked for and read, is now of the region."""

    def forget(self, key: ExpertKey) -> None:
        """Drop a resident `key` whose read failed, as if it had never been asked for."""


# name -> module path and class; a path, not the class, so that naming one costs no import.
CACHES: dict[str, str] = {
    "arc": "fate_moe.cache.arc:ARC",
    "lru": "fate_moe.cache.lru:LRU",
}


def make_cache(name: str, capacity_slots: int) -> EvictionPolicy:
    """Build the policy called `name` for a region of `capacity_slots`.

    Raises:
        ConfigError: no such policy.
    """
    if name not in CACHES:
        raise ConfigError(f"cache: {name!r} is none of {', '.join(sorted(CACHES))}")
    module, _, cls = CACHES[name].partition(":")
    policy: EvictionPolicy = getattr(import_module(module), cls)(capacity_slots)
    return policy
