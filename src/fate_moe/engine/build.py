"""How do a store and a config become a running engine?

The composition root: the only place where the four stages are wired together. What is built was
decided by `plan.draw`, before the first weight is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fate_moe.cache import ExpertTable, make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.config import Config
from fate_moe.engine.attach import attach
from fate_moe.engine.device import open_slots
from fate_moe.engine.handle import Engine
from fate_moe.engine.plan import Blueprint, computes_natively, draw
from fate_moe.errors import ConfigError, FormatError
from fate_moe.memory import Arena
from fate_moe.memory.device import DeviceArena
from fate_moe.models.kv_cache import chunks_continue
from fate_moe.models.load import load_residents
from fate_moe.models.quantized import use_native
from fate_moe.models.routing_bias import routing_biases
from fate_moe.models.seam import MoESite
from fate_moe.moe import MoELayer
from fate_moe.predict import Known, Predictor, make_predictor
from fate_moe.predict.ridge import FittedRouter
from fate_moe.prefetch.mover import Mover
from fate_moe.prefetch.passing import Passing
from fate_moe.prefetch.there import There
from fate_moe.store.fitted import STAGES, Map, read_fitted
from fate_moe.store.reader import FileReader, RecordReader
from fate_moe.telemetry import peak_rss_bytes
from fate_moe.types import ExpertKey, Progress, no_progress


def build(
    store: Path,
    config: Config,
    *,
    progress: Progress = no_progress,
    reader: RecordReader | None = None,
    slowed: Callable[[RecordReader], RecordReader] = lambda reader: reader,
) -> Engine:
    """Load a store's model and attach an engine to it.

    Args:
        store: folder that `fate convert` made.
        config: the user's choices.
        progress: told about loading and preloading.
        reader: stands in for the store's own reader, for tests of slow and failing disks.
        slowed: gets what fills the slots, from disk or the host's memory, and returns what shall.
    Raises:
        FateError: as `plan.draw`; ReadError when a preloaded expert cannot be read.
    """
    earlier_peak = peak_rss_bytes()
    blueprint = draw(store, config)
    if blueprint.device.type == "cuda":
        # cuDNN's attention plans anew for every length: 15 ms a layer and token on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    progress("loading the model", 0, 1)
    model, sites = load_residents(
        store, blueprint.skeleton, blueprint.dtype, blueprint.device, narrow=blueprint.narrow
    )
    progress("loading the model", 1, 1)
    _check_sites(blueprint, sites)
    predictor = make_predictor(config.predict, _known(blueprint, sites))
    regions, spare = blueprint.share_out(predictor.width)
    arena, reader = open_slots(blueprint, reader or _open_reader(blueprint), progress)
    try:
        reader = slowed(reader)
        mover = _make_mover(blueprint, predictor, ExpertTable(
            regions, spare, partial(make_cache, config.cache.cache)
        ), arena, reader)  # fmt: skip
    except BaseException:
        reader.close()
        raise
    try:
        how, layers = attach(blueprint, sites, predictor, mover, arena)
        natively = computes_natively(config)
        use_native(model, natively)
        if natively:
            _fuse(model, blueprint.context_tokens)
        is_biased = _bias_routers(blueprint, sites, mover)
        if natively and not is_biased:  # a run passes hooks over
            _fuse_runs(model, sites, layers, partial(Passing, mover, predictor.learn))
        _preload(blueprint, regions, mover, progress)
    except BaseException:
        _stop(mover, reader)
        raise
    routers = [site.askable for site in sites]
    decoder_layers = [site.layer for site in sites]
    engine = Engine(
        blueprint, model, mover, reader, how, layers, routers, decoder_layers, earlier_peak
    )
    model.fate = engine
    # Whoever calls `model.generate` gets the plan's bounds too.
    if chunks_continue(model):
        model.generation_config.prefill_chunk_size = blueprint.memory.demands.chunk_tokens
    model.register_forward_pre_hook(_context_guard(blueprint.context_tokens), with_kwargs=True)
    # A model that is dropped without `close` gives its threads, files and slots back too.
    weakref.finalize(model, _stop, mover, reader)
    return engine


def _make_mover(
    blueprint: Blueprint,
    predictor: Predictor,
    table: ExpertTable,
    arena: Arena | DeviceArena,
    reader: RecordReader,
) -> Mover:
    layers, prefetch = blueprint.manifest.layers, blueprint.config.prefetch
    return Mover(
        table,
        reader,
        arena,
        [layer.record_bytes for layer in layers],
        io_threads=prefetch.io_threads,
        window=prefetch.window,
        head_bytes=[layer.head_read_bytes for layer in layers],
        guess_levels=_guess_levels(blueprint, predictor),
    )


def _guess_levels(blueprint: Blueprint, predictor: Predictor) -> int:
    # Where nothing has to be read, guessing costs its time only. A window asks for it all the same.
    is_needless = blueprint.holds_all and blueprint.config.prefetch.window is None
    if not predictor.width or is_needless:
        return 1
    return 3 if predictor.sharpens else 2


def _known(blueprint: Blueprint, sites: list[MoESite]) -> Known:
    maps = read_fitted(blueprint.store, blueprint.manifest, blueprint.skeleton.hidden)
    top_k, device = blueprint.skeleton.top_k, blueprint.device
    early, late = (
        [_router_of(one, top_k, stage, device) for one in maps[stage]] for stage in STAGES
    )
    return Known(
        [site.askable for site in sites], [site.num_experts for site in sites], early, late
    )


def _router_of(
    one: Map | None, top_k: int, stage: str, device: torch.device
) -> FittedRouter | None:
    if one is None:
        return None
    weight, bias = (torch.from_numpy(part).to(device) for part in (one.weight, one.bias))
    return FittedRouter(weight, bias, top_k, is_normed=stage == "late")


def _bias_routers(blueprint: Blueprint, sites: list[MoESite], mover: Mover) -> bool:
    """Let routers prefer what is in memory if that was asked for; say whether they do."""
    bias = blueprint.config.compute.routing_bias
    if not bias:
        return False
    family = str(blueprint.skeleton.config.model_type)
    there = [There(mover, layer, site.num_experts) for layer, site in enumerate(sites)]
    hooks = routing_biases(
        sites, there, bias,
        family=family, hidden=blueprint.skeleton.hidden, dtype=blueprint.dtype,
    )  # fmt: skip
    if blueprint.holds_all:
        return False  # no choice changes
    for site, hook in zip(sites, hooks, strict=True):
        site.after_router(hook)
    return True


def _fuse(model: Any, tokens: int) -> None:
    from fate_moe.models.fused import fuse  # defines classes of transformers', slow to import

    fuse(model, tokens)


def _fuse_runs(
    model: Any, sites: list[MoESite], layers: list[MoELayer], hold: Callable[..., Passing]
) -> None:
    from fate_moe.models.fuse_runs import fuse_runs

    fuse_runs(model, {s.experts: layer for s, layer in zip(sites, layers, strict=True)}, hold)


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


def _preload(blueprint: Blueprint, regions: Regions, mover: Mover, progress: Progress) -> None:
    # Layers that are resident as a whole never need a policy: fill them now. The others fill
    # with what the router really chooses.
    whole = [
        ExpertKey(layer, expert)
        for layer, count in enumerate(blueprint.experts)
        if regions.holds_whole(layer, blueprint.experts)
        for expert in range(count)
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


def _context_guard(most: int) -> Callable[..., None]:
    """Refuse a step that would grow the key/value cache beyond what was planned."""

    def guard(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor):
            return
        past = kwargs.get("past_key_values")
        length = ids.shape[1] + (0 if past is None else int(past.get_seq_length()))
        if ids.shape[0] * length > most:
            raise ConfigError(
                f"prompt: {ids.shape[0]} x {length} tokens, the plan has room for {most} with the "
                "answer; shorten it or raise context_tokens (--context)"
            )

    return guard
