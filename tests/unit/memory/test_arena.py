"""Slots are apart, aligned, and the same bytes for readers and for computing."""

import ctypes
import mmap
from array import array
from pathlib import Path

import pytest

from fate_moe.errors import CacheError
from fate_moe.memory import Arena
from fate_moe.memory.arena import HUGE_PAGE


def test_views_and_tensors_share_bytes_and_slots_do_not() -> None:
    arena = Arena(3, 8192)
    for slot in range(3):
        arena.view(slot)[:] = bytes([slot + 1]) * 8192
    for slot in range(3):
        assert set(arena.tensor(slot).tolist()) == {slot + 1}
        assert arena.tensor(slot).data_ptr() == ctypes.addressof(
            ctypes.c_char.from_buffer(arena.view(slot))
        )


def test_every_slot_can_be_read_into_directly() -> None:
    arena = Arena(5, 4096)
    assert all(arena.tensor(slot).data_ptr() % 4096 == 0 for slot in range(5))


def test_slots_that_could_not_be_are_refused() -> None:
    with pytest.raises(CacheError, match="5000 is no multiple of 4096"):
        Arena(2, 5000)


def smaps_of(address: int) -> dict[str, str]:
    """The system's account of the mapping that begins at `address`."""
    rows = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    first = next(i for i, row in enumerate(rows) if row.startswith(f"{address:x}-"))
    pairs = (row.split(":", 1) for row in rows[first + 1 :] if ":" in row.split(" ")[0])
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            break
        found[name] = value.strip()
    return found


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_huge_pages_are_asked_for_as_far_as_whole_ones_fit() -> None:
    arena = Arena(5, HUGE_PAGE // 2 + 4096)
    start = arena.address(0)
    assert start % HUGE_PAGE == 0
    assert "hg" in smaps_of(start)["VmFlags"].split()
    assert int(smaps_of(start)["Size"].split()[0]) * 1024 == 2 * HUGE_PAGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_slots_take_no_more_memory_than_they_have_bytes() -> None:
    arena = Arena(7, 5 * 2**20)
    assert held_bytes(arena) == 0
    arena.view(3)[:] = bytes([1]) * arena.slot_bytes
    assert arena.slot_bytes <= held_bytes(arena) <= arena.slot_bytes + 2 * HUGE_PAGE
    for slot in range(7):
        arena.view(slot)[::4096] = bytes(arena.slot_bytes // 4096)
    assert held_bytes(arena) <= 7 * 5 * 2**20


def held_bytes(arena: Arena) -> int:
    """What the system has given for the arena's mapping, by the kernel's own page table.

    Not by `smaps`: the kernel may join a neighbour's mapping with this one in a single row there.
    """
    whole = arena.view(0).obj
    first = ctypes.addressof(ctypes.c_char.from_buffer(whole)) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as table:
        table.seek(8 * first)
        entries = array("Q", table.read(8 * (len(whole) // mmap.PAGESIZE)))
    return mmap.PAGESIZE * sum(entry >> 63 for entry in entries)


def test_systems_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    arena = Arena(3, HUGE_PAGE)
    arena.view(2)[:] = bytes([7]) * HUGE_PAGE
    assert set(arena.tensor(2)[::4096].tolist()) == {7}
