"""Where do the bytes of resident experts live?

One anonymous mapping of S equal slots on the HOST tier. It starts on a page boundary, and slot
sizes are multiples of 4096, so a slot is a legal target of an O_DIRECT read. Pages are taken from
the system only when a slot is first filled. Knows nothing of experts.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from fate_moe.errors import CacheError

ALIGNMENT = 4096


class Arena:
    """One allocation, `slots` places of `slot_bytes` bytes."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if slot_bytes % ALIGNMENT:
            raise CacheError(f"slot_bytes {slot_bytes} is no multiple of {ALIGNMENT}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(-1, max(slots * slot_bytes, ALIGNMENT))
        self._bytes = memoryview(self._map)
        self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, slot: int) -> memoryview:
        """Return a writable view of one slot, for a reader."""
        start = slot * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    def tensor(self, slot: int) -> Tensor:
        """Return one slot as a tensor, uint8 [slot_bytes], without a copy."""
        start = slot * self.slot_bytes
        return self._tensor[start : start + self.slot_bytes]

    def address(self, slot: int) -> int:
        """Return where one slot starts, for the native core."""
        return self._tensor.data_ptr() + slot * self.slot_bytes
