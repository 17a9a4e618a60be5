"""How fast could a cell be at best on this machine?

In memory every weight that a token needs is read once; under a limit the experts that are not in
memory come from disk. A share of that ceiling says more than tokens per second. Reading a prompt in
memory is bound by arithmetic; it has no ceiling here.
"""

from __future__ import annotations

from pathlib import Path

from fate_moe.bench.machine import Card
from fate_moe.store.format import Manifest
from fate_moe.store.header import read_header

_EMBEDDING = "embed_tokens."  # of it a token reads one row


def token_bytes(store: Path, manifest: Manifest, top_k: int) -> int:
    """Return the bytes of weights that one token reads: residents, and K experts of each layer.

    Raises:
        FormatError: the resident file breaks its format.
    """
    header = read_header(store / manifest.resident.file)
    resident = sum(
        tensor.nbytes for name, tensor in header.tensors.items() if _EMBEDDING not in name
    )
    return resident + sum(top_k * layer.record_bytes for layer in manifest.layers)


def decode_ceiling(card: Card, read_bytes: float, moved_bytes: float) -> float | None:
    """Return the most tokens per second; memory and disk work at the same time, as far as they do.

    Args:
        read_bytes: of weights a token, from memory.
        moved_bytes: of experts a token, from disk.
    Returns:
        None where bytes moved and the disk was not measured.
    """
    disk_s = _disk_seconds(card, moved_bytes)
    if disk_s is None:
        return None
    return 1 / _seconds_of_both(card, read_bytes / card.memory_rate, disk_s)


def prefill_ceiling(card: Card, tokens: int, moved_bytes: float) -> float | None:
    """Return the most tokens per second of a prompt whose experts came from disk; None if none."""
    disk_s = _disk_seconds(card, moved_bytes)
    return tokens / disk_s if disk_s else None


def _seconds_of_both(card: Card, memory_s: float, disk_s: float) -> float:
    """Return how long both take at least, from how long each takes alone.

    Rates that were measured, each alone and both at once, and any mix of them over time can be
    reached: the shortest time lies on the hull of the three points.
    """
    if card.both_bytes_s is None or not card.disk_rate or not disk_s:
        return max(memory_s, disk_s)
    memory, disk = (
        min(1.0, have / alone)
        for have, alone in zip(card.both_bytes_s, (card.memory_rate, card.disk_rate), strict=True)
    )
    if memory + disk <= 1:  # side by side gains nothing over one after the other
        return memory_s + disk_s
    return max(memory_s + disk_s * (1 - memory) / disk, disk_s + memory_s * (1 - disk) / memory)


def _disk_seconds(card: Card, moved_bytes: float) -> float | None:
    if not moved_bytes:
        return 0.0
    return moved_bytes / card.disk_rate if card.disk_rate else None
