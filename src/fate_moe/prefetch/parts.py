"""Which bytes of a record does a read bring?

All of it, its INT2 head, or the rest, which makes a head whole. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fate_moe.cache.table import Entry, ExpertTable, Part
from fate_moe.store.reader import Request
from fate_moe.types import Choice, ExpertKey


class Parts:
    """Sizes of the records of each layer, and of their heads."""

    def __init__(self, record_bytes: Sequence[int], head_bytes: Sequence[int] = ()) -> None:
        """Take the sizes over.

        Args:
            record_bytes: of one record of each layer, [L].
            head_bytes: of what a read of its head brings, [L]; empty where there are no heads.
        """
        self.record_bytes = tuple(record_bytes)
        self._head_bytes = tuple(head_bytes) or self.record_bytes

    def bytes(self, entry: Entry) -> int:
        """Return how many bytes are on their way to an entry, or are there."""
        layer = entry.key.layer
        if entry.part is Part.WHOLE:
            return self.record_bytes[layer]
        head = self._head_bytes[layer]
        return head if entry.part is Part.HEAD else self.record_bytes[layer] - head

    def of(self, layer: int, low: bool) -> Part:
        """Say what to read of a record of which nothing is there."""
        return Part.HEAD if low and self._has_head(layer) else Part.WHOLE

    def lowered(self, choice: Choice, table: ExpertTable) -> Choice:
        """Make low what is light and neither whole in its slot nor about to be."""
        layer = choice.layer
        if not choice.light or not self._has_head(layer):
            return choice
        found = {expert: table.get(ExpertKey(layer, expert)) for expert in choice.light}
        low = {expert for expert, entry in found.items() if not _gets_whole(entry)}
        return replace(choice, low=choice.low | low)

    def request(self, entry: Entry, slot: Any) -> Request:
        """Describe the read that fills an entry's slot, given all of the slot's bytes."""
        length = self.bytes(entry)
        start = self._head_bytes[entry.key.layer] if entry.part is Part.REST else 0
        urgent = entry.locks > 0 or not entry.guessed
        return Request(entry.key, slot[start : start + length], start, length, urgent)

    def _has_head(self, layer: int) -> bool:
        return self._head_bytes[layer] < self.record_bytes[layer]


def _gets_whole(entry: Entry | None) -> bool:
    return entry is not None and (entry.part is not Part.HEAD or entry.then_rest)
