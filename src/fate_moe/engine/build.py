"""How do a store and a config become a running engine?

The composition root: the only place where the four stages are wired together. What is built was
decided by `plan.draw`, before the first weight is read.
"""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path

import torch

from fate_moe.cache import ExpertTable, make_cache
from fate_moe.compute import EagerExperts
from fate_moe.config import Config
from fate_moe.engine.handle import Engine
from fate_moe.engine.plan import Blueprint, draw
from fate_moe.errors import FormatError
from fate_moe.memory import Arena
from fate_moe.models.load import load_residents
from fate_moe.models.seam import MoESite
from fate_moe.moe import MoELayer
from fate_moe.predict import Predictor, make_predictor
from fate_moe.prefetch.mover import Mover
from fate_moe.quant.codec import decode
from fate_moe.quant.record import RecordLayout
from fate_moe.store.reader import FileReader, RecordReader
from fate_moe.telemetry import restart_peak
from fate_moe.types import ExpertKey, Progress, no_progress


def build(
    store: Path,
    config: Config,
    *,
    progress: Progress = no_progress,
    reader: RecordReader | None = None,
) -> Engine:
    """Load a store's model and attach an engine to it.

    Args:
        store: folder that `fate convert` made.
        config: the user's choices.
        progress: told about loading and preloading.
        reader: stands in for the store's own reader, for tests of slow and failing disks.
    Raises:
        FateError: as `plan.draw`; ReadError when a preloaded expert cannot be read.
    """
    restart_peak()  # what came before, such as a conversion, is not this run's
    blueprint = draw(store, config)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    progress("loading the model", 0, 1)
    model, sites = load_residents(store, blueprint.skeleton, blueprint.dtype)
    progress("loading the model", 1, 1)
    _check_sites(blueprint, sites)
    predictor = make_predictor(config.predict, [site.askable for site in sites])
    regions, spare = blueprint.share_out(predictor.width)
    reader = reader or _open_reader(blueprint)
    arena = Arena(blueprint.memory.slots, blueprint.memory.demands.slot_bytes)
    mover = Mover(
        ExpertTable(regions, spare, partial(make_cache, config.cache.cache)),
        reader,
        arena.view,
        [layer.record_bytes for layer in blueprint.manifest.layers],
        io_threads=config.prefetch.io_threads,
        window=config.prefetch.window,
    )
    try:
        _attach(blueprint, sites, predictor, mover, arena)
        _preload(blueprint, regions, mover, progress)
    except BaseException:
        _stop(mover, reader)
        raise
    engine = Engine(blueprint, model, mover, reader, _mode(blueprint, reader, sites))
    model.fate = engine
    # A model that is dropped without `close` gives its threads, files and slots back too.
    weakref.finalize(model, _stop, mover, reader)
    return engine


def _stop(mover: Mover, reader: RecordReader) -> None:
    mover.close()
    reader.close()


def _open_reader(blueprint: Blueprint) -> RecordReader:
    prefetch = blueprint.config.prefetch
    return FileReader(
        blueprint.store,
        blueprint.manifest,
        direct=prefetch.direct,
        verify_on_read=prefetch.verify,
    )


def _attach(
    blueprint: Blueprint,
    sites: list[MoESite],
    predictor: Predictor,
    mover: Mover,
    arena: Arena,
) -> None:
    layouts: dict[str, RecordLayout] = {}
    for index, (site, entry) in enumerate(zip(sites, blueprint.manifest.layers, strict=True)):
        same = json.dumps(entry.layout, sort_keys=True)
        layout = layouts.setdefault(same, RecordLayout.from_json(entry.layout))
        if layout.record_bytes != entry.record_bytes:
            raise FormatError(
                f"{entry.file}: record_bytes {entry.record_bytes}, its layout makes "
                f"{layout.record_bytes}; convert the model again"
            )
        experts = EagerExperts(partial(decode, layout), site.math, arena.tensor)
        layer = MoELayer(index, predictor, mover, experts)
        site.attach(layer.forward, layer.before_router)


def _preload(blueprint: Blueprint, regions: list[int], mover: Mover, progress: Progress) -> None:
    # Layers that are resident as a whole never need a policy: fill them now. The others fill
    # with what the router really chooses.
    whole = [
        ExpertKey(layer, expert)
        for layer, (have, need) in enumerate(zip(regions, blueprint.experts, strict=True))
        if have == need
        for expert in range(need)
    ]
    if whole:
        mover.preload(whole, lambda done: progress("loading experts", done, len(whole)))


def _check_sites(blueprint: Blueprint, sites: list[MoESite]) -> None:
    found = [site.path for site in sites]
    expected = [layer.path for layer in blueprint.manifest.layers]
    if found != expected:
        raise FormatError(
            f"{blueprint.store}: the store has experts for {len(expected)} layers, the model of "
            f"its config.json asks for {len(found)} others; convert the model again"
        )


def _mode(blueprint: Blueprint, reader: RecordReader, sites: list[MoESite]) -> str:
    config = blueprint.config
    bits = blueprint.manifest.quantization.get("bits", 4)
    parts = [
        f"policy {config.policy} (predictor {config.predict.predictor}, cache "
        f"{config.cache.cache}, allocation {config.cache.allocation})",
        f"experts INT{bits}, computed in {str(blueprint.dtype).removeprefix('torch.')}",
        f"{reader.mode} reads",
    ]
    blind = sum(site.askable is None for site in sites)
    if blind and config.predict.predictor == "cross_layer":
        parts.append(f"no guesses for {blind} layers whose router needs more than its gate input")
    return "; ".join(parts)
