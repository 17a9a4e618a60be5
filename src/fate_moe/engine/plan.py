"""What will a run look like, decided before a byte of weights is read?

Everything comes from headers, the config and the user's limits; `build` only carries it out.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fate_moe import native
from fate_moe.budget import MemoryPlan, available_bytes, make_plan
from fate_moe.cache import make_cache
from fate_moe.cache.allocation import Regions, make_regions
from fate_moe.compute import make_low_experts
from fate_moe.config import Config
from fate_moe.engine.demands import CONTEXT_BYTES, context_tokens, demands_of, tiers_of
from fate_moe.errors import ConfigError
from fate_moe.memory.device import Card, CudaCard
from fate_moe.models.load import Skeleton, choose_dtype, read_skeleton
from fate_moe.predict import Known, make_predictor
from fate_moe.store.format import Manifest, read_manifest
from fate_moe.telemetry import rss_bytes, system_available_bytes


def computes_natively(config: Config) -> bool:
    """Say whether the native core computes what it can: layers, records, most families' experts."""
    on_gpu = config.limits.vram is not None
    return config.compute.compute != "eager" and not on_gpu and native.is_available()


def stays_narrow(config: Config, manifest: Manifest, dtype: torch.dtype) -> bool:
    """Say whether large matrices of bfloat16 stay so: where the core computes in float32.

    Not beside experts as they are: a prompt through those gives the bits of plain transformers.
    """
    as_they_are = manifest.quantization["bits"] not in (4, 8)
    return computes_natively(config) and dtype is torch.float32 and not as_they_are


def open_card() -> Card:
    """Return the card that torch computes on.

    Raises:
        ConfigError: there is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "vram: torch finds no CUDA card here (or is a build for the CPU); leave --vram out, "
            "or install torch for your card"
        )
    return CudaCard()


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A run before it is built.

    Attributes:
        store: the store's folder.
        manifest: what is in it.
        skeleton: the model's shape.
        dtype: what it computes in.
        context_tokens: prompt and answer together.
        memory: the memory plan of where the slots are.
        card: the GPU that they are on; None: they are in the host's memory.
        host: the host's memory plan if there is a GPU; its slots are records in pinned memory.
    """

    store: Path
    config: Config
    manifest: Manifest
    skeleton: Skeleton
    dtype: torch.dtype
    context_tokens: int
    memory: MemoryPlan
    card: Card | None = None
    host: MemoryPlan | None = None

    @property
    def device(self) -> torch.device:
        """What the model computes on."""
        return torch.device("cpu") if self.card is None else self.card.device

    @property
    def narrow(self) -> bool:
        """Whether large matrices of bfloat16 stay so; see `models/records.py`."""
        return stays_narrow(self.config, self.manifest, self.dtype)

    @property
    def experts(self) -> list[int]:
        """Experts of each layer, [L]."""
        return [layer.num_experts for layer in self.manifest.layers]

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert."""
        return self.memory.slots >= sum(self.experts)

    def share_out(self, guess_width: int) -> tuple[Regions, int]:
        """Split the slots into regions and the spare ones.

        Args:
            guess_width: most experts guessed for one layer in decode, 0 without a predictor.
        Returns:
            The regions, and the spare slots.
        """
        slots, cache = self.memory.slots, self.config.cache
        spare = 0
        if not self.holds_all:
            # Room for one layer's guesses, or for its demands read side by side. A cache smaller
            # than that gives up at most a third of itself.
            spare = max(1, min(max(guess_width, self.skeleton.top_k), slots // 3))
        regions = make_regions(cache.allocation, self.experts, slots - spare, cache.shallow_layers)
        return regions, slots - regions.slots


def draw(store: Path, config: Config) -> Blueprint:
    """Decide everything about a run.

    Raises:
        StoreError, FormatError: the store is missing or damaged.
        ConfigError: a name is unknown, or the context is longer than the model's.
        ModelError: the config is of no family that transformers knows.
        BudgetError: the limits are below the floor.
    """
    # Names first: a typing error should not cost the time it takes to load a model.
    make_predictor(config.predict, Known())
    make_cache(config.cache.cache, 1)
    make_low_experts(config.compute.int2, config.compute.int2_share)
    make_regions(config.cache.allocation, [], 0, 0)
    manifest = read_manifest(store)
    _check_int2(manifest, config)
    skeleton = read_skeleton(store)
    on_gpu = config.limits.vram is not None
    natively = computes_natively(config)
    dtype = choose_dtype(config.compute.dtype, skeleton.dtype, natively, on_gpu)
    card = open_card() if on_gpu else None  # before the process is weighed: it grows by this
    context = context_tokens(config.limits, skeleton)
    scored, cache = config.limits.scored_tokens, config.cache.cache
    narrow = stays_narrow(config, manifest, dtype)
    need = demands_of(store, manifest, skeleton, dtype, context, scored, cache, narrow=narrow)
    gc.collect()  # an engine before this one may be unreachable and still hold its slots
    available = available_bytes(rss_bytes(), system_available_bytes())
    if card is None:
        memory = make_plan(config.limits, need, available)
        return Blueprint(store, config, manifest, skeleton, dtype, context, memory)
    threads = config.prefetch.io_threads
    on_device, on_host = tiers_of(store, need, manifest, skeleton, dtype, threads)
    memory = make_plan(config.limits, on_device, card.free_bytes() + CONTEXT_BYTES, "vram")
    host = make_plan(replace(config.limits, experts=None), on_host, available)
    return Blueprint(store, config, manifest, skeleton, dtype, context, memory, card, host)


def _check_int2(manifest: Manifest, config: Config) -> None:
    bits = manifest.quantization["bits"]
    compute = config.compute
    name = "int2" if compute.int2 != "never" else "int2_on_miss" if compute.int2_on_miss else ""
    if name and bits != 4:
        raise ConfigError(
            f"{name}: the store holds experts of {bits} bits, two bits come from the head of four; "
            "convert the model with --bits 4"
        )
