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
    gpu,
    make_low_experts,
)
from fate_moe.engine.plan import Blueprint
from fate_moe.errors import ConfigError, FormatError
from fate_moe.memory import Arena
from fate_moe.memory.device import DeviceArena
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
        name: native, triton or eager.
        detail: the instruction set or the card, or why it is eager; empty where that was asked for.
    """

    name: str
    detail: str = ""


def attach(
    blueprint: Blueprint,
    sites: list[MoESite],
    predictor: Predictor,
    mover: Mover,
    arena: Arena | DeviceArena,
) -> tuple[ComputePath, list[MoELayer]]:
    """Let the model of `sites` compute its experts from the arena's slots.

    Returns:
        How they are computed, and the layers, [L].
    Raises:
        FormatError: a layer's records are not what the manifest says.
        NativeUnavailable, ConfigError: a path was asked for and cannot be had.
    """
    layers = blueprint.manifest.layers
    layouts: dict[str, RecordLayout] = {}
    for entry in layers:
        same = json.dumps(entry.layout, sort_keys=True)
        if same not in layouts:
            layouts[same] = RecordLayout.from_json(entry.layout)
        _check(blueprint, entry, layouts[same])
    own = [layouts[json.dumps(entry.layout, sort_keys=True)] for entry in layers]
    asked = blueprint.config.compute.compute
    if isinstance(arena, DeviceArena):
        path = _choose_on_gpu(asked, sites, own, arena.memory.device)
    else:
        path = _choose(asked, sites, own)
    if path.name == "triton" and isinstance(arena, DeviceArena):
        sums = _triton_sums(sites, own, arena)
    elif path.name == "native" and isinstance(arena, Arena):
        sums = _native_sums(sites, own, arena)
    else:
        sums = _eager_sums(sites, own, arena)
    compute = blueprint.config.compute
    low_experts = make_low_experts(compute.int2, compute.int2_share)
    moe_layers = []
    for index, (site, experts) in enumerate(zip(sites, sums, strict=True)):
        layer = MoELayer(
            index, site.num_experts, predictor, mover, experts, low_experts, compute.int2_on_miss
        )
        site.attach(layer.forward, layer.before_router)
        if predictor.sharpens and mover.benefit.levels > 1:
            site.watch_layer(layer.before_layer)
        moe_layers.append(layer)
    return path, moe_layers


def _choose(asked: str, sites: list[MoESite], layouts: list[RecordLayout]) -> ComputePath:
    if asked == "eager":
        return ComputePath("eager")
    if asked == "triton":
        raise ConfigError("compute: triton computes on a GPU; name how much of it: --vram SIZE")
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


def _choose_on_gpu(
    asked: str, sites: list[MoESite], layouts: list[RecordLayout], device: torch.device
) -> ComputePath:
    if asked == "eager":
        return ComputePath("eager")
    if asked == "native":
        raise ConfigError("compute: native computes on the processor; leave --vram out")
    why = gpu.why_missing()
    if not why and not all(gpu.can_compute(layout) for layout in layouts):
        why = "the GPU's kernels read experts of 4 bits"
    elif not why and any(find_gate_form(site.experts) is None for site in sites):
        why = "the GPU's kernels do not know this family's activation"
    if not why:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return ComputePath("triton", name)
    if asked == "triton":
        raise ConfigError(f"compute: triton cannot be had: {why}; leave it at auto")
    return ComputePath("eager", why)


def _triton_sums(
    sites: list[MoESite], layouts: list[RecordLayout], arena: DeviceArena
) -> list[RoutedSum]:
    forms = [find_gate_form(site.experts) for site in sites]
    return [
        gpu.GpuExperts(layout, form, arena.memory)
        for layout, form in zip(layouts, forms, strict=True)
        if form is not None  # `_choose_on_gpu` has looked
    ]


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


def _eager_sums(
    sites: list[MoESite], layouts: list[RecordLayout], arena: Arena | DeviceArena
) -> list[RoutedSum]:
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
