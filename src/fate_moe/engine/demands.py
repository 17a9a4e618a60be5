"""How much memory does a model need besides its expert slots?

Read from headers and the config alone, before any weight: the input of `budget.make_plan`. Every
figure is an upper bound; `tests/gates` compares the sum with the peak that a run really reaches.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from fate_moe.budget import Demands
from fate_moe.cache.policy import cache_bytes
from fate_moe.config import Limits
from fate_moe.errors import ConfigError
from fate_moe.models.load import Skeleton
from fate_moe.models.quantized import UNPACKED_BYTES
from fate_moe.models.records import is_record, kept_narrow, record_shapes
from fate_moe.store.format import Manifest
from fate_moe.store.header import read_header
from fate_moe.telemetry import rss_bytes

SHORT_CHUNK_TOKENS = 512
"""Tokens of a prompt, or of a text, that go through any model at once."""
_LONG_CHUNK_TOKENS = 2048
_CHUNK_SHARE = 0.1  # of what the routed experts weigh: its activations may take no more

DEFAULT_CONTEXT_TOKENS = 4096

_MARGIN_BYTES = 64 * 2**20  # allocator slack, thread stacks, libraries loaded late
# One expert being unpacked, in bytes per byte of its record. From four bits: codes, float32 weights
# and the model's dtype, 12 bytes a weight over half a byte. Unquantized: at most a cast.
_UNPACKED = {4: 24, 8: 12, 16: 3, 32: 2}
_FLOOR_SLOTS = 3  # two in their regions and one spare: the least that still overlaps

CONTEXT_BYTES = 2**30
"""What a CUDA driver, its libraries and their workspaces take of a card, at most."""

_LATE_BYTES = 768 * 2**20  # CUDA libraries that load when first used, Triton and its compiler
_ROUNDED_BYTES = 64 * 2**20  # torch takes a card's memory in pieces of 2 and 20 MiB

Shapes = list[tuple[int, ...]]


def demands_of(
    store: Path,
    manifest: Manifest,
    skeleton: Skeleton,
    dtype: torch.dtype,
    context: int,
    scored: int,
    cache: str,
    *,
    narrow: bool = False,
) -> Demands:
    """Size up a store.

    Args:
        store: its folder.
        dtype: what the model computes in.
        context: prompt and answer together, in tokens.
        scored: tokens whose scores over the vocabulary are held at once.
        cache: name of the eviction policy.
        narrow: large matrices of bfloat16 stay so.
    """
    header = read_header(store / manifest.resident.file)
    kept = list(kept_narrow(header, skeleton.module).values()) if narrow else []
    records = [entry for name, entry in header.tensors.items() if is_record(name)] + kept
    names = {entry.name for entry in records}
    plain = [entry for name, entry in header.tensors.items() if name not in names]
    sizes = [prod(entry.shape) * dtype.itemsize for entry in plain]
    matrices = record_shapes(header, skeleton.module) + [entry.shape for entry in kept]
    shapes = [entry.shape for entry in plain] + list(matrices)
    records_bytes = sum(entry.nbytes for entry in records)
    # Before the process is weighed: asking the family's code takes memory for good, the first time.
    kv_bytes = skeleton.kv_bytes(context, dtype)
    per_token = _bytes_per_token(skeleton, shapes, matrices, dtype, context)
    chunk = _chunk_tokens(manifest, skeleton, per_token, context)
    return Demands(
        base_bytes=rss_bytes(),
        weights_bytes=sum(sizes) + records_bytes,
        # Records are read into the place where they stay, the rest through a mapped file.
        load_bytes=manifest.resident.bytes - records_bytes + max(sizes, default=0) + _MARGIN_BYTES,
        kv_bytes=kv_bytes,
        workspace_bytes=chunk * per_token
        + _unpacking_bytes(manifest)
        + (10 * skeleton.vocabulary + UNPACKED_BYTES if matrices else 0)
        + _score_bytes(skeleton, scored)
        # Read in 16 bits, kept in 32.
        + (3 * manifest.fitted.bytes if manifest.fitted else 0)
        + cache_bytes(cache, [layer.num_experts for layer in manifest.layers]),
        chunk_tokens=chunk,
        slot_bytes=max(layer.record_bytes for layer in manifest.layers),
        num_experts=sum(layer.num_experts for layer in manifest.layers),
        floor_slots=_FLOOR_SLOTS,
    )


def tiers_of(
    store: Path,
    need: Demands,
    manifest: Manifest,
    skeleton: Skeleton,
    dtype: torch.dtype,
    threads: int,
) -> tuple[Demands, Demands]:
    """Split what a run needs between a GPU and its host.

    Args:
        need: as of `demands_of`.
        threads: that read from disk, each with room for one record.
    Returns:
        Of the GPU, where the slots are; of the host, whose "slots" are records in pinned memory.
    """
    header = read_header(store / manifest.resident.file)
    # Matrices in codes are unpacked, one after the other: a GPU has no use for codes there.
    sizes = [prod(shape) * dtype.itemsize for shape in record_shapes(header, skeleton.module)]
    packed = sum(entry.nbytes for name, entry in header.tensors.items() if is_record(name))
    widest = max(max(shape[1:]) for layer in manifest.layers for shape in layer.params.values())
    parts_bytes = need.chunk_tokens * skeleton.top_k * widest * dtype.itemsize
    device = replace(
        need,
        base_bytes=CONTEXT_BYTES,
        weights_bytes=need.weights_bytes - packed + sum(sizes),
        load_bytes=_MARGIN_BYTES,
        workspace_bytes=need.workspace_bytes + parts_bytes + _ROUNDED_BYTES,
    )
    host = replace(
        need,
        weights_bytes=0,
        load_bytes=need.weights_bytes + need.load_bytes + 2 * max(sizes, default=0),
        kv_bytes=0,
        workspace_bytes=_LATE_BYTES,
        floor_slots=threads,
    )
    return device, host


def context_tokens(limits: Limits, skeleton: Skeleton) -> int:
    """Return how many tokens prompt and answer may have together.

    Raises:
        ConfigError: more than the model was made for.
    """
    if limits.context_tokens is None:
        return min(DEFAULT_CONTEXT_TOKENS, skeleton.max_context)
    if limits.context_tokens > skeleton.max_context:
        raise ConfigError(
            f"context: have {limits.context_tokens} tokens, the model takes at most "
            f"{skeleton.max_context}"
        )
    return limits.context_tokens


def chunk_sizes(tokens: int, most: int) -> list[int]:
    """Return the sizes of the chunks, as equal as can be, that a prompt goes through a model in.

    Args:
        most: longest chunk, in tokens.
    """
    count = -(-tokens // most)
    return [tokens * (i + 1) // count - tokens * i // count for i in range(count)]


def _chunk_tokens(manifest: Manifest, skeleton: Skeleton, per_token: int, context: int) -> int:
    """Say how long a chunk is: every chunk reads nearly all experts once more.

    By the model and the context alone: the last bits of a product depend on how many tokens are
    multiplied at once, and an answer must not depend on the budget.
    """
    if skeleton.prefills_whole:
        return context
    experts = sum(layer.num_experts * layer.record_bytes for layer in manifest.layers)
    chunk = _LONG_CHUNK_TOKENS
    while chunk > SHORT_CHUNK_TOKENS and chunk * per_token > _CHUNK_SHARE * experts:
        chunk //= 2
    return min(chunk, context)


def _bytes_per_token(
    skeleton: Skeleton, shapes: Shapes, matrices: Shapes, dtype: torch.dtype, context: int
) -> int:
    numbers = (
        (18 + skeleton.top_k) * skeleton.hidden  # live hidden states and the experts' parts
        + 3 * max(_widths(shapes, skeleton), default=skeleton.hidden)  # gate, up, product
        + context * skeleton.mask_rows  # attention mask or scores
    )
    # What is computed from records has float32 and int8 copies beside it.
    widest = max(_widths(matrices, skeleton), default=skeleton.hidden)
    return numbers * dtype.itemsize + (10 * max(widest, skeleton.hidden) if matrices else 0)


def _unpacking_bytes(manifest: Manifest) -> int:
    largest = max(layer.record_bytes for layer in manifest.layers)
    return _UNPACKED[_bits(manifest)] * largest + _MARGIN_BYTES


def _widths(shapes: Shapes, skeleton: Skeleton) -> list[int]:
    """Return the outputs of all matrices [out, in] but those of the vocabulary."""
    return [s[0] for s in shapes if len(s) == 2 and s[0] != skeleton.vocabulary]


def _bits(manifest: Manifest) -> int:
    bits = manifest.quantization["bits"]
    assert isinstance(bits, int)  # read_manifest checks it
    return bits


def _score_bytes(skeleton: Skeleton, scored: int) -> int:
    """Float32 logits of the scored positions and five arrays as large: two models are compared."""
    return 6 * 4 * skeleton.vocabulary * scored
