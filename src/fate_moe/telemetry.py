"""What happened, and what does it mean?

Counters that the mover feeds, and the report made from them. Definitions are GLOSSARY.md's: one
request = one distinct expert of one layer in one forward step. Callers hold the mover's lock.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fate_moe.config import format_bytes
from fate_moe.types import Phase, Prediction


@dataclass(slots=True)
class Counts:
    """Sums over requests; `saved` = requests served by a guess, resident or in flight.

    `partial`: of the misses, those of which the INT2 head was there. `low`: of the requests, those
    that are computed from it; `rerouted`: those that the router chose only for being there.

    `recall_hit / recall_of` is recall at the full width of the guess, `core_hit / recall_of` at
    the router's own top-k width.
    """

    requests: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    saved: int = 0
    partial: int = 0
    low: int = 0
    rerouted: int = 0
    recall_of: int = 0
    recall_hit: int = 0
    core_hit: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits / requests."""
        return _ratio(self.hits, self.requests)

    @property
    def recall(self) -> float | None:
        """|predicted and routed| / |routed| over the layers that were predicted."""
        return _ratio(self.recall_hit, self.recall_of)

    @property
    def recall_top_k(self) -> float | None:
        """Recall when only as many experts are guessed as the router takes."""
        return _ratio(self.core_hit, self.recall_of)

    def add_guess(self, guess: Prediction, asked: Sequence[int]) -> None:
        """Count how much of what a router asked for was guessed; `asked` are distinct ids."""
        experts = set(asked)
        self.recall_of += len(experts)
        self.recall_hit += len(experts.intersection(guess.ranked))
        self.core_hit += len(experts.intersection(guess.ranked[: guess.core]))

    def add(self, other: Counts) -> None:
        """Add another's sums to these."""
        for name in Counts.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Leases:
    """Seconds that leases were open: computing experts, and of that `stall_s` waiting for bytes."""

    lease_s: float = 0.0
    stall_s: float = 0.0


@dataclass(slots=True)
class Telemetry:
    """Everything counted during a run; `reset` starts anew, residents stay."""

    layers: int
    counts: dict[Phase, list[Counts]] = field(default_factory=dict)
    leases: dict[Phase, Leases] = field(default_factory=dict)
    guesses: int = 0
    guesses_used: int = 0
    bytes_demand: int = 0
    bytes_speculated: int = 0
    bytes_wasted: int = 0
    bytes_preloaded: int = 0
    stall_s: float = 0.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all counts but the preload."""
        self.counts = {phase: [Counts() for _ in range(self.layers)] for phase in Phase}
        self.leases = {phase: Leases() for phase in Phase}
        self.guesses = self.guesses_used = 0
        self.bytes_demand = self.bytes_speculated = self.bytes_wasted = 0
        self.stall_s = 0.0

    def total(self, phase: Phase | None = None, layer: int | None = None) -> Counts:
        """Sum over phases and layers, or over the one named."""
        whole = Counts()
        for p, per_layer in self.counts.items():
            if phase in (None, p):
                for counts in per_layer if layer is None else [per_layer[layer]]:
                    whole.add(counts)
        return whole


class LinkMeter:
    """How fast does the slower tier deliver? Bytes over the time in which a read was under way.

    A read's end may be told long after it: what lies between it and the next one's beginning is no
    time of the link's.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.busy_s = 0.0
        self._begun: deque[float] = deque()  # of the reads under way, oldest first
        self._counted_until_s = -math.inf

    @property
    def active(self) -> int:
        """Reads under way."""
        return len(self._begun)

    def begin(self, now_s: float, reads: int = 1) -> None:
        """So many reads start."""
        self._begun.extend([now_s] * reads)

    def end(self, end_s: float, read_bytes: int) -> None:
        """A read was over at `end_s`; it brought `read_bytes`."""
        # Whose it was does not matter: as long as one is under way, the link is busy.
        since_s = max(self._begun.popleft(), self._counted_until_s)
        self.busy_s += max(0.0, end_s - since_s)
        self._counted_until_s = max(self._counted_until_s, end_s)
        self.bytes += read_bytes

    def forget(self) -> None:
        """Drop the reads under way: nobody will tell of their ends."""
        self._begun.clear()

    @property
    def bytes_per_s(self) -> float | None:
        """The measured rate, None before the first read."""
        return self.bytes / self.busy_s if self.busy_s > 0 else None


class MovingAverage:
    """A mean that forgets: the newest value weighs a tenth."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.value = value if self.value is None else 0.9 * self.value + 0.1 * value


@dataclass(frozen=True, slots=True)
class Report:
    """The state of an engine in the words of the contract; see `Engine.report`."""

    mode: str
    guessing: str
    requests: int
    hits: int
    late: int
    misses: int
    low: int
    rerouted: int
    hit_rate: float | None
    recall: float | None
    recall_top_k: float | None
    coverage: float | None
    accuracy: float | None
    guesses: int
    guesses_used: int
    evictions: int
    bytes_demand: int
    bytes_speculated: int
    bytes_wasted: int
    bytes_preloaded: int
    stall_s: float
    experts_capacity: int
    experts_total: int
    working_set: int
    expert_bytes: int
    link_bytes_s: float | None
    budget_bytes: int
    planned_bytes: int
    floor_bytes: int
    vram_budget_bytes: int | None
    vram_planned_bytes: int | None
    vram_peak_bytes: int | None
    host_capacity: int | None
    host_hits: int | None
    host_misses: int | None
    peak_rss_bytes: int
    earlier_peak_bytes: int
    phases: dict[str, dict[str, object]]
    per_layer: list[dict[str, object]]

    def __str__(self) -> str:
        lines = (f"{name:>17}  {value}" for name, value in self.rows())
        return "\n".join(lines)

    @property
    def _peaked_earlier(self) -> bool:
        return self.peak_rss_bytes <= self.earlier_peak_bytes

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines a person wants to read, as (name, text)."""
        token_sets = self.experts_capacity / self.working_set
        link = (
            "not measured" if self.link_bytes_s is None else f"{format_bytes(self.link_bytes_s)}/s"
        )
        return [
            ("mode", self.mode),
            (
                "experts in memory",
                f"{self.experts_capacity} of {self.experts_total} "
                f"({format_bytes(self.experts_capacity * self.expert_bytes)}, "
                f"{token_sets:.1f} token working sets)",
            ),
            (
                "requests",
                f"{self.requests} = {self.hits} hits + {self.late} late + {self.misses} misses "
                f"(hit rate {percent(self.hit_rate)})"
                + (f", {self.low} in two bits" if self.low else "")
                + (f", {self.rerouted} rerouted" if self.rerouted else ""),
            ),
            (
                "prediction",
                f"recall {percent(self.recall)}, coverage {percent(self.coverage)}, "
                f"accuracy {percent(self.accuracy)} of {self.guesses} guesses",
            ),
            ("guessing", self.guessing),
            (
                "bytes moved",
                f"{format_bytes(self.bytes_demand)} demanded, "
                f"{format_bytes(self.bytes_speculated)} guessed "
                f"({format_bytes(self.bytes_wasted)} wasted), link {link}",
            ),
            ("stall", f"{self.stall_s:.3f} s"),
            (
                "memory",
                f"peak {format_bytes(self.peak_rss_bytes)} of {format_bytes(self.budget_bytes)} "
                f"allowed (planned {format_bytes(self.planned_bytes)})"
                # Such as the conversion on a model's first use: not part of the plan.
                + (", reached before loading" if self._peaked_earlier else ""),
            ),
            *self._gpu_rows(),
        ]

    def _gpu_rows(self) -> list[tuple[str, str]]:
        peak, budget, planned = (
            self.vram_peak_bytes, self.vram_budget_bytes, self.vram_planned_bytes
        )  # fmt: skip
        if peak is None or budget is None or planned is None:
            return []
        text = f"peak {format_bytes(peak)} of {format_bytes(budget)} allowed "
        rows = [("GPU memory", f"{text}(planned {format_bytes(planned)})")]
        if self.host_hits is not None and self.host_misses is not None:
            reads = self.host_hits + self.host_misses
            text = f"{self.host_capacity} of {self.experts_total} experts"
            rows.append(
                ("pinned memory", f"{text}, {self.host_hits} of {reads} reads found theirs")
            )
        return rows


def percent(share: float | None) -> str:
    """Write a share for people; None (nothing to divide by) as a dash."""
    return "-" if share is None else f"{100 * share:.1f} %"


def counts_json(counts: Counts) -> dict[str, object]:
    """Return the counts and rates of one phase or layer, for `--json`."""
    return {
        "requests": counts.requests,
        "hits": counts.hits,
        "late": counts.late,
        "misses": counts.misses,
        "low": counts.low,
        "rerouted": counts.rerouted,
        "hit_rate": counts.hit_rate,
        "recall": counts.recall,
        "recall_top_k": counts.recall_top_k,
    }


def phase_json(telemetry: Telemetry, phase: Phase) -> dict[str, object]:
    """Return the counts of one phase and how long its leases were open, for `--json`."""
    leases = telemetry.leases[phase]
    times = {"lease_s": leases.lease_s, "stall_s": leases.stall_s}
    return {**counts_json(telemetry.total(phase)), **times}


def per_layer_json(telemetry: Telemetry, capacities: Sequence[int]) -> list[dict[str, object]]:
    """Return one row per MoE layer with its counts, both phases together.

    Args:
        capacities: slots of each layer's region, [L]; layers that share one show all of it.
    """
    return [
        {"layer": i, "capacity": c, **counts_json(telemetry.total(layer=i))}
        for i, c in enumerate(capacities)
    ]


def peak_rss_bytes() -> int:
    """Return the most memory this process has held since its start.

    Linux's VmHWM belongs to the program that runs now; getrusage's figure would include what the
    parent held before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Return the memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def system_available_bytes() -> int:
    """Return the memory the system could still give to this process."""
    return int(psutil.virtual_memory().available)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
