"""Which parts of a model are computed in one native call each when it decodes?

A transformers layer is some fifty small operations, each of which costs microseconds beside what it
computes. Here modules get, one by one, a forward that does the same natively, where a trial beside
their own shows that it is the same: for one token, and feed-forwards of codes for prompts, too.
Batches, other dtypes, masks that hide something, and modules of another make go the family's own
way.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import Tensor, nn

from fate_moe.models.fused_attention import FusedAttention, fuse_attention
from fate_moe.models.fused_block import FusedBlock, fuse_block
from fate_moe.models.fused_layer import FusedLayer, fuse_layer, layers_of
from fate_moe.models.fused_parts import (
    FusedDense,
    FusedLinear,
    FusedNorm,
    FusedRouter,
    fuse_part,
)
from fate_moe.models.fused_step import Positions
from fate_moe.models.seam import find_experts
from fate_moe.models.turnstile import Turnstile

_log = logging.getLogger(__name__)


def fuse(model: nn.Module, tokens: int) -> dict[str, int]:
    """Let a model decode with native forwards where they are the same as its own.

    Args:
        model: of transformers, loaded.
        tokens: prompt and answer together, at most; caches make room for no more at once.
    Returns:
        How many of each kind: layer, attention, block, norm, router, linear, dense.
    """
    counts: Counter[str] = Counter()
    positions = Positions()
    whole: list[tuple[Any, FusedAttention]] = []
    rotaries = _rotaries(model)
    for layer, attention in layers_of(model):
        fused = fuse_attention(attention, rotaries, tokens, positions)
        if fused is not None:
            whole.append((layer, fused))
    for layer, fused in whole:
        around = fuse_layer(layer, fused)
        fused.module.forward = fused.forward
        counts["attention"] += 1
        if around is not None:
            layer.forward = around.forward
            counts["layer"] += 1
    experts = set(find_experts(model).values())
    inner = {one for _, fused in whole for one in fused.projections}  # computed by who has them
    for module in model.modules():
        if module in inner:
            continue
        block = fuse_block(module) if experts & set(module._modules.values()) else None
        if block is not None:
            module.forward = block.forward
            counts["block"] += 1
            inner.update(block.projections)
            continue
        part = None if module in experts else fuse_part(module)
        if part is not None:
            module.forward = part[1].forward
            counts[part[0]] += 1
            inner.update(getattr(part[1], "projections", ()))
    _let_in_one_thread(model)
    _log.debug("computed in one native call each: %s", dict(counts))
    return dict(counts)


def _let_in_one_thread(model: nn.Module) -> None:
    """Guard all feed-forwards by one turnstile: a run takes all of them for a token anyway."""
    alone = Turnstile()
    for module in model.modules():
        fused = getattr(module.__dict__.get("forward"), "__self__", None)
        dense = fused.shared if isinstance(fused, FusedBlock) else fused
        if isinstance(dense, FusedDense):
            dense.alone = alone


def _rotaries(model: nn.Module) -> list[int]:
    """List how many elements of a head the rotary embeddings of a model turn."""
    frequencies = (getattr(module, "inv_freq", None) for module in model.modules())
    return sorted({2 * one.numel() for one in frequencies if isinstance(one, Tensor)})


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back."""
    from fate_moe.models.fused_run import RunLayer

    kinds = (
        FusedAttention, FusedBlock, FusedLayer, FusedDense, FusedLinear, FusedNorm, FusedRouter,
        RunLayer,
    )  # fmt: skip
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(getattr(forward, "__self__", None), kinds):
            del module.__dict__["forward"]
