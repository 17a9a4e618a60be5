"""Does it fit, and how many expert slots does the user's number buy?

One plan in bytes, made before the first expert is read; everything that allocates takes its share
from here. Invariant: `planned_bytes` is at most `budget_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fate_moe.config import Limits, format_bytes
from fate_moe.errors import BudgetError

AVAILABLE_SHARE = 0.75
"""Share of the available memory that a run takes when the user names no number."""


_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOTS = {  # controllers in /proc/self/cgroup -> where they are mounted, name of the limit
    "": (Path("/sys/fs/cgroup"), "memory.max"),  # version 2
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
}


@dataclass(frozen=True, slots=True)
class Demands:
    """What a run needs besides its expert slots; all in bytes unless the name says otherwise.

    Attributes:
        base_bytes: the process with its libraries, before any weight.
        weights_bytes: everything that is not a routed expert, in the compute dtype.
        load_bytes: extra while loading (file pages mapped beside the weights), gone afterwards.
        kv_bytes: key/value cache for the whole context.
        workspace_bytes: activations of one chunk of a prompt and the experts being computed.
        chunk_tokens: longest piece of a prompt that goes through the model at once.
        slot_bytes: one expert slot.
        num_experts: routed experts of the whole model.
        floor_slots: fewest slots that can run at all.
    """

    base_bytes: int
    weights_bytes: int
    load_bytes: int
    kv_bytes: int
    workspace_bytes: int
    chunk_tokens: int
    slot_bytes: int
    num_experts: int
    floor_slots: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The sizes a run is built with."""

    budget_bytes: int
    demands: Demands
    slots: int

    @property
    def arena_bytes(self) -> int:
        """All expert slots together."""
        return self.slots * self.demands.slot_bytes

    @property
    def planned_bytes(self) -> int:
        """The highest point of the run: while loading, or while generating."""
        return _peak_bytes(self.demands, self.slots)

    @property
    def floor_bytes(self) -> int:
        """The least budget that can run this model with this context."""
        return _peak_bytes(self.demands, self.demands.floor_slots)


def _peak_bytes(need: Demands, slots: int) -> int:
    # The arena is touched only after the weights are in and their file is unmapped.
    running = need.kv_bytes + need.workspace_bytes + slots * need.slot_bytes
    return need.base_bytes + need.weights_bytes + max(need.load_bytes, running)


def make_plan(limits: Limits, need: Demands, available_bytes: int, what: str = "ram") -> MemoryPlan:
    """Turn the user's limits into a number of slots.

    Args:
        limits: what the user asked for.
        need: what the model needs.
        available_bytes: memory that is free now for this process, its own share included.
        what: the limit that this memory has, ram or vram.
    Raises:
        BudgetError: the limits are below the floor; the message names the floor.
    """
    limit = limits.vram if what == "vram" else limits.ram
    budget = limit.of(available_bytes) if limit else int(available_bytes * AVAILABLE_SHARE)
    if what == "vram":  # a card has no swap, and others may have taken some of it
        budget = min(budget, available_bytes)
    floor = _peak_bytes(need, need.floor_slots)
    if budget < floor:
        raise BudgetError(
            f"{what}: have {format_bytes(budget)}, need at least {format_bytes(floor)} "
            f"({_parts(need)}); try --{what} {_round_up_mib(floor)}MiB or a smaller --context",
            budget_bytes=budget,
            floor_bytes=floor,
        )
    fixed = need.base_bytes + need.weights_bytes + need.kv_bytes + need.workspace_bytes
    affordable = min(need.num_experts, (budget - fixed) // need.slot_bytes)
    if limits.experts is None:
        return MemoryPlan(budget, need, affordable)
    wanted = min(
        need.num_experts, limits.experts.of(need.num_experts * need.slot_bytes) // need.slot_bytes
    )
    if wanted < need.floor_slots:
        least = need.floor_slots * need.slot_bytes
        raise BudgetError(
            f"experts: have {wanted} slots, need at least {need.floor_slots} "
            f"({format_bytes(least)}); try --experts {_round_up_mib(least)}MiB",
            budget_bytes=wanted * need.slot_bytes,
            floor_bytes=least,
        )
    if wanted > affordable:
        have = format_bytes(budget)
        most = affordable * need.slot_bytes // 1024
        raise BudgetError(
            f"experts: {wanted} slots need {format_bytes(_peak_bytes(need, wanted))}, have {have}; "
            f"try --experts {most}KiB or a larger --{what}",
            budget_bytes=budget,
            floor_bytes=_peak_bytes(need, wanted),
        )
    return MemoryPlan(budget, need, wanted)


def available_bytes(own_rss_bytes: int, system_available_bytes: int) -> int:
    """Return what this process may use: free memory plus its own, within its cgroup's limit."""
    limit = _cgroup_limit_bytes()
    total = own_rss_bytes + system_available_bytes
    return total if limit is None else min(total, limit)


def _cgroup_limit_bytes() -> int | None:
    """Return the tightest memory limit of this process's cgroup and those around it."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers not in _CGROUP_ROOTS:
            continue
        root, name = _CGROUP_ROOTS[controllers]
        # Inside a container the path may be the host's; then only the root is there to read.
        inner = root / own.lstrip("/")
        for folder in (inner, *inner.parents):
            limits += _limit(folder / name)
            if folder == root:
                break
    return min(limits, default=None)


def _limit(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() and int(text) < 2**60 else []


def _parts(need: Demands) -> str:
    slots = need.floor_slots * need.slot_bytes
    parts = {
        "process": need.base_bytes,
        "weights": need.weights_bytes,
        "loading": need.load_bytes,
        "context": need.kv_bytes,
        "workspace": need.workspace_bytes,
        "experts": slots,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def _round_up_mib(count: int) -> int:
    return -(-count // 2**20)
