"""Which layers of a model are runs, and does a run compute what its layers compute?

Each run is tried beside its layers when a model is loaded, on random records: with everything in
memory, with every other layer's experts elsewhere, and stopping at every layer, as where guesses
are made (none are). It must have the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from fate_moe.compute import Arriving, NativeExperts
from fate_moe.models.fused_block import FusedBlock
from fate_moe.models.fused_layer import FusedLayer
from fate_moe.models.fused_parts import FusedDense, FusedRouter
from fate_moe.models.fused_run import FusedRun, Held, RunLayer, Sparse
from fate_moe.models.fused_step import stand_ins
from fate_moe.moe import MoELayer
from fate_moe.prefetch.passing import Passed, Place
from fate_moe.quant.record import RecordLayout
from fate_moe.types import ExpertKey

_log = logging.getLogger(__name__)

_RECORDS = 3  # that the experts of a trial share; a prime that no E is likely to be a multiple of


def fuse_runs(
    model: nn.Module, moe_layers: Mapping[nn.Module, MoELayer], hold: Callable[..., Held]
) -> int:
    """Let tokens go through runs of fused layers in few native calls.

    Args:
        model: of transformers; `fuse` has been over it, and its experts are attached.
        moe_layers: by their experts module.
        hold: makes what says which experts are resident, from E of layers by their number.
    Returns:
        How many layers are part of a run.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    count = 0
    for path, layers in _runs_of(model, moe_layers, config):
        sparse = [one.feed_forward for one in layers if isinstance(one.feed_forward, Sparse)]
        if len(layers) < 2 or len({part.router.k for part in sparse}) != 1:
            continue
        home: Any = model.get_submodule(path)
        for one in layers:
            one.layer.module.forward = one.forward
        if not _equals(layers, home, config):
            _log.debug("a run of %d layers differs from them one by one", len(layers))
            for one in layers:
                one.layer.module.forward = one.layer.forward
            continue
        held = hold({part.moe.layer: part.router.experts for part in sparse})
        run = FusedRun(layers, home, held, config)
        owner = model.get_submodule(path.rpartition(".")[0])
        owner.register_forward_pre_hook(run.enter)
        owner.register_forward_hook(run.leave, always_call=True)
        for number, one in enumerate(layers):
            one.join(run, number)
        count += len(layers)
    return count


def _runs_of(
    model: nn.Module, moe_layers: Mapping[nn.Module, MoELayer], config: Any
) -> Iterator[tuple[str, list[RunLayer]]]:
    """Yield the longest lists of neighbours that may be part of a run, and the list's path.

    Layers of different types get different masks: they are no run.
    """
    types = getattr(config, "layer_types", None) or ()

    def kind(part: RunLayer | None) -> tuple[bool, Any]:
        index = 0 if part is None else part.layer.attention.index
        return part is not None, types[index] if index < len(types) else None

    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            parts = [_run_layer(one, moe_layers) for one in modules]
            for (is_part, _), some in groupby(parts, kind):
                if is_part:
                    yield path, [part for part in some if part is not None]


def _run_layer(module: nn.Module, moe_layers: Mapping[nn.Module, MoELayer]) -> RunLayer | None:
    layer = _fused(module)
    if not isinstance(layer, FusedLayer) or layer.residual != 1.0:
        return None
    inner = _fused(layer.feed_forward)
    if isinstance(inner, FusedDense):
        return RunLayer(layer, inner)
    moe = moe_layers.get(inner.experts) if isinstance(inner, FusedBlock) else None
    router = _fused(inner.router) if moe is not None else None
    if moe is None or not isinstance(router, FusedRouter):
        return None
    experts = moe.experts
    if not isinstance(experts, NativeExperts) or router.experts != moe.num_experts:
        return None
    if not moe.keeps_all_bits(router.k):
        return None
    return RunLayer(layer, Sparse(inner, router, experts, moe))


def _fused(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("forward"), "__self__", None)


class _Trial:
    """Says of a trial's experts that they are resident, each in a slot of its own number."""

    def __init__(self, level: int, keys: Sequence[ExpertKey]) -> None:
        self._level = level
        self._places: list[Place] = [(key, key.expert) for key in keys]

    def guess_level(self) -> int:
        return self._level

    def open(self, place: Callable[[list[Place]], None]) -> None:
        place(self._places)

    def close(self, passed: Sequence[Passed]) -> None:
        """Book nothing."""


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Stands in for a layer of a trial: its missing experts land, in the slots of their numbers."""

    layer: int
    observer: None = None

    def before_router(self, gate_input: Tensor) -> None:
        """Guess nothing."""

    def skip_layer(self) -> None:
        """Guess nothing."""

    def gather(
        self, ids: Tensor, weights: Tensor, compute: Callable[[Arriving], None],
        beside: Callable[[], None],
    ) -> None:  # fmt: skip
        beside()
        compute([(e, e, False)] for e in ids[0].tolist())


@torch.no_grad()
def _equals(layers: Sequence[RunLayer], home: Any, config: Any) -> bool:
    """Try a run and its layers, one by one, on the same token and the same short history."""
    draw = torch.Generator().manual_seed(0)
    records: dict[RecordLayout, Tensor] = {}
    ways: dict[nn.Module, Callable[..., Any]] = {}
    tried, keys = [], []
    for one in layers:
        part = one.feed_forward
        if isinstance(part, Sparse):
            layout = part.experts.layout
            if layout not in records:
                records[layout] = _random_records(layout, draw)
            experts = copy(part.experts)
            experts.slot_address = partial(_address, records[layout])
            ways[part.block.experts] = partial(_compute_experts, experts)
            keys += [ExpertKey(part.moe.layer, e) for e in range(part.router.experts)]
            part = replace(part, experts=experts, moe=_Gathered(part.moe.layer))
        tried.append(RunLayer(one.layer, part))
    refusals = (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        with stand_ins(ways):
            want, call = _token(layers, config)
            for one in layers:
                want = one.layer.forward(want, **call)
            for level, some in ((0, keys), (0, [key for key in keys if key.layer % 2]), (1, keys)):
                x, call = _token(layers, config)
                run = FusedRun(tried, home, _Trial(level, some), config)
                run.enter()
                got = run.compute(x, call)
                if got is None or not torch.equal(got, want):
                    return False
    except refusals:
        return False
    return True


def _random_records(layout: RecordLayout, draw: torch.Generator) -> Tensor:
    """Make a few records [n, bytes] of random codes and biases, all of one scale."""
    size = _RECORDS, layout.record_bytes
    records = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    for record in records:
        for at in layout.offsets:
            record[at.scale : at.zero].view(torch.float16).fill_(0.01)
            record[at.zero : at.zero + (at.zero - at.scale)].view(torch.float16).fill_(
                2 ** (layout.bits - 1)
            )
        for bias, offset in zip(layout.biases, layout.bias_offsets, strict=True):
            values = torch.randn(bias.size, generator=draw)
            record[offset : offset + 4 * bias.size].view(torch.float32).copy_(values)
    return records


def _address(records: Tensor, slot: int) -> int:
    return int(records[slot % _RECORDS].data_ptr())


def _compute_experts(
    experts: NativeExperts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    beside: Callable[[], None] = lambda: None,
) -> Tensor:
    """Stand in for a layer's experts: all are there, in the slots of their numbers."""
    beside()
    return experts(x, ids, weights, [[(e, e, False) for e in ids[0].tolist()]])


def _token(layers: Sequence[RunLayer], config: Any) -> tuple[Tensor, dict[str, Any]]:
    """Draw a token and what else a layer is called with, the same each time."""
    draw = torch.Generator().manual_seed(0)
    first = layers[0].layer
    x = torch.randn(1, 1, first.width, generator=draw)
    angles = torch.randn(1, 1, first.attention.rotary // 2, generator=draw).repeat(1, 1, 2)
    cache = DynamicCache(config=config)
    for one in layers:
        attention = one.layer.attention
        heads = torch.randn(2, 1, attention.kv_heads, 3, attention.dim, generator=draw)
        cache.layers[attention.index].update(heads[0], heads[1])
    return x, {
        "position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None,
        "position_ids": torch.full((1, 1), 3), "past_key_values": cache,
    }  # fmt: skip
