"""Where do the bytes of resident experts live?

One anonymous mapping of S equal slots on the HOST tier. It starts on a page boundary, and slot
sizes are multiples of 4096, so a slot is a legal target of an O_DIRECT read. Pages are taken from
the system only when a slot is first filled, 2 MiB at a time where the system gives such pages: a
read into them names a handful of places in memory instead of a thousand. Knows nothing of experts.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from fate_moe.errors import CacheError

ALIGNMENT = 4096
HUGE_PAGE = 2 * 2**20


class Arena:
    """One allocation, `slots` places of `slot_bytes` bytes."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if slot_bytes % ALIGNMENT:
            raise CacheError(f"slot_bytes {slot_bytes} is no multiple of {ALIGNMENT}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        size = max(slots * slot_bytes, ALIGNMENT)
        self._bytes = _map(size)
        self._tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._start = self._tensor.data_ptr()

    @property
    def memory(self) -> Tensor:
        """All of it, uint8 [slots * slot_bytes]."""
        return self._tensor

    def used(self, slots: Sequence[int]) -> None:
        """Note that slots have been read: a processor is done when it says so."""

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
        return self._start + slot * self.slot_bytes


def _map(size: int) -> memoryview:
    """Return `size` bytes of fresh memory, in huge pages as far as whole ones fit."""
    huge = size - size % HUGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if not huge or advice is None:
        return memoryview(mmap.mmap(-1, size))
    # Shared memory, mmap's default, gets no huge pages.
    whole = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(whole)) % HUGE_PAGE
    with contextlib.suppress(OSError):  # a system built without them
        whole.madvise(advice, start, huge)
    return memoryview(whole)[start : start + size]
