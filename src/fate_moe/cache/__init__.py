"""WHICH EXPERTS STAY? Policies, the table of slots, and how slots are shared out. No torch."""

from fate_moe.cache.policy import CACHES, EvictionPolicy, make_cache
from fate_moe.cache.table import Entry, ExpertTable

__all__ = ["CACHES", "Entry", "EvictionPolicy", "ExpertTable", "make_cache"]
