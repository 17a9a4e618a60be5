"""Where do the bytes of resident experts live on a GPU, and how do they get there?

One allocation of S equal slots on the DEVICE tier, filled by copies that the card makes while its
kernels compute. Marks are points in the device's work. Two rules keep a slot's bytes right: it is
read only after the mark of the copy that filled it, and a copy into it begins only after the mark
of the last kernel that was told to read it. The released code of the paper keeps neither.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fate_moe.errors import CacheError, ConfigError
from fate_moe.memory.arena import ALIGNMENT, Arena

_cuda: Any = torch.cuda  # half of it has no types

Mark = Any
"""A point in a device's work, as its card knows it."""


class Card(Protocol):
    """What copies to a device and knows how far it is. Any thread may copy and wait."""

    device: torch.device

    def copy(self, source: Tensor, target: Tensor, after: Mark | None, urgent: bool) -> Mark:
        """Begin to copy bytes once `after` has passed; urgent ones wait for no others."""
        ...

    def now(self) -> Mark:
        """Mark the end of all that has been told to compute so far."""
        ...

    def settle(self) -> None:
        """Wait until all copies that were begun are over."""
        ...

    def age_s(self, mark: Mark) -> float | None:
        """Seconds since a mark was passed; None while it was not."""
        ...

    def wait(self, mark: Mark) -> None:
        """Wait until a mark is passed."""
        ...

    def pin(self, arena: Arena) -> None:
        """Lock an arena's pages, so that copies from it need no help of the processor."""
        ...

    def unpin(self, arena: Arena) -> None:
        """Let the pages go; copies from them must be over."""
        ...

    def free_bytes(self) -> int:
        """Memory of the device that nobody has taken."""
        ...

    def peak_bytes(self) -> int:
        """Most memory of the device that tensors have taken."""
        ...


@dataclass(frozen=True, slots=True)
class SlotPart:
    """Bytes [start, stop) of a slot: what a reader fills where a memoryview cannot reach."""

    slot: int
    start: int
    stop: int

    def __getitem__(self, part: slice) -> SlotPart:
        start, stop, _ = part.indices(self.stop - self.start)
        return SlotPart(self.slot, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.stop - self.start


class DeviceArena:
    """One allocation on a device, `slots` places of `slot_bytes` bytes.

    Attributes:
        memory: uint8 [slots, slot_bytes], for kernels.
    """

    def __init__(self, slots: int, slot_bytes: int, card: Card) -> None:
        if slot_bytes % ALIGNMENT:
            raise CacheError(f"slot_bytes {slot_bytes} is no multiple of {ALIGNMENT}")
        self.memory = torch.empty((slots, slot_bytes), dtype=torch.uint8, device=card.device)
        self._card = card
        self._last_use: dict[int, Mark] = {}

    def view(self, slot: int) -> SlotPart:
        """Return one slot, for a reader to fill."""
        return SlotPart(slot, 0, self.memory.shape[1])

    def tensor(self, slot: int) -> Tensor:
        """Return one slot as a tensor, uint8 [slot_bytes], without a copy."""
        return self.memory[slot]

    def used(self, slots: Sequence[int]) -> None:
        """Note that all that shall read these slots has been told to."""
        mark = self._card.now()
        for slot in slots:
            self._last_use[slot] = mark

    def fill(self, part: SlotPart, source: Tensor, urgent: bool) -> Mark:
        """Begin to copy `source` into a part of a slot, once nothing reads the slot any more."""
        after = self._last_use.get(part.slot)
        return self._card.copy(
            source, self.memory[part.slot, part.start : part.stop], after, urgent
        )


class CudaCard:
    """The card that torch computes on: a stream for what is waited for, one for guesses."""

    _CLOCK_S = 1.0  # times are told from a mark this old at most: theirs have 24 bits

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._urgent, self._other, self._idle = (_cuda.Stream() for _ in range(3))
        self._set_clock()

    def copy(self, source: Tensor, target: Tensor, after: Mark | None, urgent: bool) -> Mark:
        """Begin to copy bytes; see `Card`."""
        stream = self._urgent if urgent else self._other
        # Any thread may call, and a thread has a current card of its own.
        with torch.cuda.device(self.device):
            if after is not None:
                stream.wait_event(after)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            mark = _cuda.Event(enable_timing=True)
            mark.record(stream)
        return mark

    def now(self) -> Mark:
        """Mark the end of all that has been told to compute so far."""
        mark = _cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def settle(self) -> None:
        """Wait until all copies that were begun are over."""
        self._urgent.synchronize()
        self._other.synchronize()

    def age_s(self, mark: Mark) -> float | None:
        """Seconds since a copy's mark was passed; None while it was not."""
        if not mark.query():
            return None
        now_s = time.perf_counter()
        if now_s - self._zero_s > self._CLOCK_S:
            self._set_clock()
        passed_s: float = self._zero_s + self._zero.elapsed_time(mark) / 1e3
        return max(0.0, now_s - passed_s)

    def wait(self, mark: Mark) -> None:
        """Wait until a mark is passed."""
        mark.synchronize()

    def pin(self, arena: Arena) -> None:
        """Lock an arena's pages.

        Raises:
            ConfigError: the system lets this process lock no more.
        """
        memory = arena.memory
        # torch's own pinned allocations take up to twice what was asked for.
        with torch.cuda.device(self.device):
            code = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if code:
            self._clear_error()
            raise ConfigError(
                f"ram: {memory.numel()} bytes more cannot be locked for the GPU (CUDA error "
                f"{code}); try a smaller --ram"
            )

    def unpin(self, arena: Arena) -> None:
        """Let the pages go; see `Card`."""
        _cuda.cudart().cudaHostUnregister(arena.memory.data_ptr())

    def free_bytes(self) -> int:
        """Memory of the card that nobody has taken; what torch only keeps goes back first."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak_bytes(self) -> int:
        """Most memory that torch has taken for tensors, slots included."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def _clear_error(self) -> None:
        # It stays with the thread, and the next one to ask whether a kernel began would be told.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)

    def _set_clock(self) -> None:
        self._zero = _cuda.Event(enable_timing=True)
        self._zero.record(self._idle)
        self._zero.synchronize()
        self._zero_s = time.perf_counter()
