"""Which code computes the experts of each layer, and how does the model come to call it?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import torch

from fate_moe import native
from fate_moe.compute import (
    EagerExperts,
    NativeExperts,
    RoutedSum,
    can_compute,
    make_low_experts,
)
from fate_moe.engine.plan import Blueprint
from fate_moe.errors import ConfigError, FormatError
from fate_moe.memory import Arena
from fate_moe.models.gate_form import find_gate_form
from fate_moe.models.seam import MoESite
from fate_moe.moe import MoELayer
from fate_moe.predict import Predictor
from fate_moe.prefetch.mover import Mover
from fate_moe.quant.codec import decode, decode_int2
from fate_moe.quant.record import RecordLayout
from fate_moe.store.format import LayerEntry


@dataclass(frozen=True, slots=True)
class ComputePath:
    """How experts are computed, for `mode:`.

    Attributes:
        name: native or eager.
        detail: the instruction set, or why it is not native; empty where eager was asked for.
    """

    name: str
    detail: str = ""


def attach(
    blueprint: Blueprint,
    sites: list[MoESite],
    predictor: Predictor,
    mover: Mover,
    arena: Arena,
) -> tuple[ComputePath, list[MoELayer]]:
    """Let the model of `sites` compute its experts from the arena's slots.

    Returns:
        How they are computed, and the layers, [L].
    Raises:
        FormatError: a layer's records are not what the manifest says.
        NativeUnavailable, ConfigError: native was asked for and cannot be had.
    """
    layers = blueprint.manifest.layers
    layouts: dict[str, RecordLayout] = {}
    for entry in layers:
        same = json.dumps(entry.layout, sort_keys=True)
        if same not in layouts:
            layouts[same] = RecordLayout.from_json(entry.layout)
        _check(blueprint, entry, layouts[same])
    own = [layouts[json.dumps(entry.layout, sort_keys=True)] for entry in layers]
    path = _choose(blueprint.config.compute.compute, sites, own)
    if path.name == "native":
        sums = _native_sums(sites, own, arena)
    else:
        sums = _eager_sums(sites, own, arena)
    compute = blueprint.config.compute
    low_experts = make_low_experts(compute.int2, compute.int2_share)
    moe_layers = []
    for index, (site, experts) in enumerate(zip(sites, sums, strict=True)):
        layer = MoELayer(index, site.num_experts, predictor, mover, experts, low_experts)
        site.attach(layer.forward, layer.before_router)
        if predictor.sharpens:
            site.watch_layer(layer.before_layer)
        moe_layers.append(layer)
    return path, moe_layers


def _choose(asked: str, sites: list[MoESite], layouts: list[RecordLayout]) -> ComputePath:
    if asked == "eager":
        return ComputePath("eager")
    why = ""
    if not native.is_available():
        why = f"no native core: {native.why_missing}"
    elif not all(can_compute(layout) for layout in layouts):
        why = "the native core reads experts of 4 or 8 bits"
    elif any(find_gate_form(site.experts) is None for site in sites):
        why = "the native core does not know this family's activation"
    if not why:
        return ComputePath("native", native.core().isa())
    if asked == "native":
        native.core()  # if it is missing, its own error says what to install
        raise ConfigError(f"compute: native cannot be had: {why}; leave it at auto")
    return ComputePath("eager", why)


def _native_sums(
    sites: list[MoESite], layouts: list[RecordLayout], arena: Arena
) -> list[RoutedSum]:
    core = native.core()
    core.set_threads(torch.get_num_threads())
    step = core.Step()  # one lease is open at a time, so the layers can share its memory
    sums: list[RoutedSum] = []
    for site, layout in zip(sites, layouts, strict=True):
        form = find_gate_form(site.experts)
        assert form is not None  # `_choose` has looked
        sums.append(NativeExperts(layout, form, arena.address, step))
    return sums


def _eager_sums(sites: list[MoESite], layouts: list[RecordLayout], arena: Arena) -> list[RoutedSum]:
    return [
        EagerExperts(
            partial(decode, layout),
            site.math,
            arena.tensor,
            partial(decode_int2, layout),
        )
        for site, layout in zip(sites, layouts, strict=True)
    ]


def _check(blueprint: Blueprint, entry: LayerEntry, layout: RecordLayout) -> None:
    if layout.record_bytes != entry.record_bytes:
        raise FormatError(
            f"{entry.file}: record_bytes {entry.record_bytes}, its layout makes "
            f"{layout.record_bytes}; convert the model again"
        )
    if layout.bits != blueprint.manifest.quantization["bits"]:
        raise FormatError(
            f"{entry.file}: its layout has {layout.bits} bits, the manifest "
            f"{blueprint.manifest.quantization['bits']}; convert the model again"
        )
