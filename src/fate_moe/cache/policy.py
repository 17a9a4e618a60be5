"""What must an eviction policy do, and which ones are there?

A policy orders the resident experts of one region (the slots that share one fate; the default is
one region per MoE layer). It holds no bytes and no slots; the table owns those and tells the
policy what happened. What the router chose comes first, for a whole step; then each request:
    resident:      hit(key)
    not resident:  miss(key), then, where the region is full, victim(key, evictable) and, where
                   `admits`, evict(victim), then admit(key)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from fate_moe.errors import ConfigError
from fate_moe.types import Choice, ExpertKey, Prediction

Evictable = Callable[[ExpertKey], bool]


class EvictionPolicy:
    """The verbs of a policy; those that a policy does not define mean nothing to it.

    Each is O(1) beside the locked entries it skips, unless the policy says otherwise.
    """

    @staticmethod
    def layer_bytes(num_experts: int) -> int:
        """Return what is kept of a layer of E experts, beyond some words for each."""
        return 0

    def begin(self, choice: Choice) -> None:
        """Learn all that a router chose in a step, before the requests for it."""

    def expect(self, prediction: Prediction) -> None:
        """Learn which experts are guessed to be asked for next, in place of earlier guesses."""

    def hit(self, key: ExpertKey) -> None:
        """Learn that a resident expert was asked for."""

    def miss(self, key: ExpertKey) -> None:
        """Learn that an expert that is not resident was asked for."""

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        """Choose who makes room for `key`; None when nothing is evictable. Changes nothing."""
        raise NotImplementedError

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """Say whether `key` is worth the victim's slot. Where not, a spare one may do for now."""
        return True

    def evict(self, key: ExpertKey) -> None:
        """Learn that `key` left the region."""

    def admit(self, key: ExpertKey) -> None:
        """Learn that `key`, asked for and read, is now of the region."""

    def forget(self, key: ExpertKey) -> None:
        """Drop a resident `key` whose read failed, as if it had never been asked for."""


# name -> module path and class; a path, not the class, so that naming one costs no import.
CACHES: dict[str, str] = {
    "arc": "fate_moe.cache.arc:ARC",
    "guarded": "fate_moe.cache.guarded:Guarded",
    "lfru": "fate_moe.cache.lfru:LFRU",
    "lfu": "fate_moe.cache.lfu:LFU",
    "lru": "fate_moe.cache.lru:LRU",
    "s3fifo": "fate_moe.cache.s3fifo:S3FIFO",
    "transition": "fate_moe.cache.transition:Transition",
}


def make_cache(name: str, capacity_slots: int) -> EvictionPolicy:
    """Build the policy called `name` for a region of `capacity_slots`.

    Raises:
        ConfigError: no such policy.
    """
    policy: EvictionPolicy = _class_of(name)(capacity_slots)
    return policy


def cache_bytes(name: str, experts: Sequence[int]) -> int:
    """Return the memory that the policy called `name` takes for layers of E experts each, [L].

    Raises:
        ConfigError: no such policy.
    """
    policy = _class_of(name)
    return sum(policy.layer_bytes(count) for count in experts)


def _class_of(name: str) -> Any:
    if name not in CACHES:
        raise ConfigError(f"cache: {name!r} is none of {', '.join(sorted(CACHES))}")
    module, _, cls = CACHES[name].partition(":")
    return getattr(import_module(module), cls)
