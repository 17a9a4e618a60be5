"""Slots are apart, aligned, and the same bytes for readers and for computing."""

import ctypes

import pytest

from fate_moe.errors import CacheError
from fate_moe.memory import Arena


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
