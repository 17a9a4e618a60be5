"""How much of a prompt goes through the model at once, and what that takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.budget import Demands
from fate_moe.engine.demands import chunk_sizes, demands_of
from fate_moe.models.load import Skeleton, read_skeleton
from fate_moe.store.format import Manifest, read_manifest


@pytest.fixture
def skeleton(tiny_store: Path) -> Skeleton:
    return read_skeleton(tiny_store)


@pytest.fixture
def demand(tiny_store: Path, skeleton: Skeleton):  # type: ignore[no-untyped-def]
    def of(times: int = 1, context: int = 4096) -> Demands:
        return demands_of(tiny_store, heavier(times), skeleton, torch.float32, context, 1, "lru")

    def heavier(times: int) -> Manifest:
        manifest = read_manifest(tiny_store)
        layers = [replace(one, record_bytes=one.record_bytes * times) for one in manifest.layers]
        return replace(manifest, layers=layers)

    return of


def test_only_a_large_model_takes_long_chunks(demand, skeleton: Skeleton) -> None:  # type: ignore[no-untyped-def]
    chunks = [demand(times).chunk_tokens for times in (1, 4, 16, 64, 256, 512, 1024, 2048, 4096)]
    assert chunks[0] == 512
    assert chunks[-1] == 2048
    assert chunks == sorted(chunks)
    assert set(chunks) == {512, 1024, 2048}, chunks


def test_a_long_chunk_takes_a_tenth_of_the_experts_at_most(demand) -> None:  # type: ignore[no-untyped-def]
    for times in range(1, 200, 7):
        short, long = demand(times, 512), demand(times)
        experts = long.num_experts * long.slot_bytes
        if long.chunk_tokens > 512:
            # What the longer context adds to a row of the mask counts too.
            assert long.workspace_bytes - short.workspace_bytes < experts / 10


def test_a_short_context_needs_no_room_for_long_chunks(demand) -> None:  # type: ignore[no-untyped-def]
    assert demand(1024, 100).chunk_tokens == 100
    assert demand(1024, 100).workspace_bytes < demand(1024, 2048).workspace_bytes


@given(st.integers(1, 10_000), st.integers(1, 4096))
def test_chunks_are_equal_and_all_of_the_prompt(tokens: int, most: int) -> None:
    sizes = chunk_sizes(tokens, most)
    assert sum(sizes) == tokens
    assert 0 < min(sizes) <= max(sizes) <= min(most, min(sizes) + 1)
    assert len(sizes) == -(-tokens // most)
