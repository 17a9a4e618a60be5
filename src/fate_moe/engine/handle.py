"""What can be asked of an engine that runs?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fate_moe.engine.attach import ComputePath
from fate_moe.engine.demands import CONTEXT_BYTES
from fate_moe.engine.plan import Blueprint
from fate_moe.models.quantized import is_native
from fate_moe.models.records import resident_bits
from fate_moe.moe import MoELayer
from fate_moe.predict import Router
from fate_moe.prefetch.mover import Mover
from fate_moe.prefetch.staged import StagedReader
from fate_moe.store.format import Manifest
from fate_moe.store.reader import RecordReader
from fate_moe.telemetry import Report, peak_rss_bytes, per_layer_json, phase_json
from fate_moe.types import Phase

_REACHED = {
    "O_DIRECT": "O_DIRECT reads", "buffered": "buffered reads",
    "pinned": "copies from pinned memory",
}  # fmt: skip


@dataclass(slots=True)
class Engine:
    """What a loaded model carries as `model.fate`.

    Attributes:
        blueprint: what was decided before loading: config, store, memory plan.
        model: the transformers model whose experts this engine serves.
        mover: the tables, the reads and their counts.
        reader: what fills the slots.
        compute: how its experts are computed.
        layers: the MoE layers, [L].
        routers: their routers, [L]; None where one cannot be asked from its gate input alone.
        decoder_layers: what each MoE layer is in, [L]; None where that is unknown.
        earlier_peak_bytes: most memory the process had held before this engine was planned.
    """

    blueprint: Blueprint
    model: Any
    mover: Mover
    reader: RecordReader
    compute: ComputePath
    layers: Sequence[MoELayer]
    routers: Sequence[Router | None]
    decoder_layers: Sequence[nn.Module | None]
    earlier_peak_bytes: int

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together."""
        return self.blueprint.context_tokens

    @property
    def chunk_tokens(self) -> int:
        """Longest piece of a prompt that goes through the model at once."""
        return self.blueprint.memory.demands.chunk_tokens

    @property
    def mode(self) -> str:
        """In words, what this run does and every way it differs from the checkpoint."""
        blueprint, config = self.blueprint, self.blueprint.config
        predictor = config.predict.predictor
        if predictor == "ridge" and blueprint.manifest.fitted is None:
            predictor = "cross_layer (fate calibrate would fit a better one)"
        if predictor != "none" and self.mover.benefit.levels == 1:
            predictor += ", not asked: every expert is in memory"
        parts = [
            f"policy {config.policy} (predictor {predictor}, cache "
            f"{config.cache.cache}, allocation {config.cache.allocation})",
            f"experts {_form(blueprint.manifest)}, {self._computed}",
            *self._resident,
            _REACHED[self.reader.mode],
        ]
        if config.compute.int2 == "always":
            parts.append("every expert computed from two bits")
        elif config.compute.int2 == "tail":
            parts.append(
                "in prefill the least popular experts (at most "
                f"{config.compute.int2_share:.0%} of the routed tokens) computed from two bits"
            )
        parts += self._in_decode
        blind = sum(router is None for router in self.routers)
        if blind and config.predict.predictor in ("cross_layer", "ridge"):
            parts.append(
                f"{blind} layers guessed from history: their router needs more than a gate input"
            )
        return "; ".join(parts)

    @property
    def _in_decode(self) -> list[str]:
        compute = self.blueprint.config.compute
        parts = []
        depends = bool(compute.int2_on_miss)
        if compute.int2_on_miss:
            parts.append(
                f"in decode experts below {100 * compute.int2_on_miss:g}% of a token's router "
                "weights computed from two bits where not whole in memory"
            )
        if compute.routing_bias:
            depends = depends or not self.blueprint.holds_all
            parts.append(
                f"in decode the routers' logits of experts in memory raised by "
                f"{compute.routing_bias:g}"
                + (" (no effect: every expert has a slot)" if self.blueprint.holds_all else "")
            )
        ending = "the answer depends" if depends else "exact: the answer does not depend"
        return [*parts, f"{ending} on what is in memory"]

    @property
    def _computed(self) -> str:
        path, dtype = self.compute, str(self.blueprint.dtype).removeprefix("torch.")
        if path.name == "native":
            return f"computed natively ({path.detail}, activations INT8), the rest in {dtype}"
        if path.name == "triton":
            return f"computed by Triton kernels ({path.detail}), all in {dtype}"
        return f"computed in {dtype}" + (f" ({path.detail})" if path.detail else "")

    @property
    def _resident(self) -> list[str]:
        bits, native = resident_bits(self.blueprint.manifest), is_native(self.model)
        if bits == 16:
            return ["resident bfloat16, computed natively"] if native else []
        dtype = str(self.blueprint.dtype).removeprefix("torch.")
        return [f"resident INT{bits}, computed {'natively' if native else f'in {dtype}'}"]

    def report(self) -> Report:
        """Say what happened since the engine was built or `reset`."""
        telemetry, table = self.mover.telemetry, self.mover.table
        blueprint, plan = self.blueprint, self.blueprint.memory
        host = blueprint.host or plan
        card = blueprint.card
        vram = plan if card else None
        kept = self.reader.cache if isinstance(self.reader, StagedReader) else None
        total = telemetry.total()
        return Report(
            mode=self.mode,
            guessing=self.mover.benefit.describe(),
            requests=total.requests,
            hits=total.hits,
            late=total.late,
            misses=total.misses,
            low=total.low,
            rerouted=total.rerouted,
            hit_rate=total.hit_rate,
            recall=total.recall,
            recall_top_k=total.recall_top_k,
            coverage=_share(total.saved, total.saved + total.misses),
            accuracy=_share(telemetry.guesses_used, telemetry.guesses),
            guesses=telemetry.guesses,
            guesses_used=telemetry.guesses_used,
            evictions=table.evictions,
            bytes_demand=telemetry.bytes_demand,
            bytes_speculated=telemetry.bytes_speculated,
            bytes_wasted=telemetry.bytes_wasted,
            bytes_preloaded=telemetry.bytes_preloaded,
            stall_s=telemetry.stall_s,
            experts_capacity=plan.slots,
            experts_total=plan.demands.num_experts,
            working_set=blueprint.skeleton.top_k * len(blueprint.manifest.layers),
            expert_bytes=plan.demands.slot_bytes,
            link_bytes_s=self.mover.link.bytes_per_s,
            budget_bytes=host.budget_bytes,
            planned_bytes=host.planned_bytes,
            floor_bytes=host.floor_bytes,
            vram_budget_bytes=vram.budget_bytes if vram else None,
            vram_planned_bytes=vram.planned_bytes if vram else None,
            host_capacity=kept.places if kept else None,
            host_hits=kept.hits if kept else None,
            host_misses=kept.misses if kept else None,
            vram_peak_bytes=CONTEXT_BYTES + card.peak_bytes() if card else None,
            peak_rss_bytes=peak_rss_bytes(),
            earlier_peak_bytes=self.earlier_peak_bytes,
            phases={phase.value: phase_json(telemetry, phase) for phase in Phase},
            per_layer=per_layer_json(telemetry, table.regions.of_layers),
        )

    def reset(self) -> None:
        """Set the report's counts to zero; resident experts stay."""
        self.mover.reset()

    def close(self) -> None:
        """Stop the reader threads and close the store; a second call does nothing."""
        self.mover.close()
        self.reader.close()


def _form(manifest: Manifest) -> str:
    bits = manifest.quantization["bits"]
    if bits in (16, 32):
        return f"unquantized ({manifest.dtype})"
    is_minmax = manifest.quantization.get("scales") == "minmax"
    return f"INT{bits}" + (" (min-max scales)" if is_minmax else "")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
