"""Which of many caches, allocations, predictors and capacities does best on a trace?

One cell is one replay. Cells are independent and run side by side, each in a process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

from fate_moe.cache.allocation import Regions, make_regions
from fate_moe.cache.belady import Belady
from fate_moe.cache.policy import CACHES, EvictionPolicy, make_cache
from fate_moe.errors import ConfigError
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.replay import MakePolicy, Replay, replay
from fate_moe.sim.timeline import Link, Timed, time_decode
from fate_moe.sim.trace import Trace, read_trace
from fate_moe.types import ExpertKey, Progress, no_progress

BELADY = "belady"


@dataclass(frozen=True, slots=True)
class Cell:
    """One replay.

    Attributes:
        trace: its file.
        cache, allocation, predictor: names.
        capacity: share of all experts that have slots, in (0, 1].
        leases: as in `replay`; None = where a predictor guesses.
        shallow_layers: of the allocation `shallow`.
        expert_bytes: size of a record where the trace does not say.
        link: how fast records come in and tokens are computed; None: reads take no time. With one,
            only decode steps are counted, always with leases.
    """

    trace: Path
    cache: str
    allocation: str
    predictor: str
    capacity: float
    leases: bool | None = None
    shallow_layers: int = 4
    expert_bytes: int = 2**20
    link: Link | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a cell; the words are GLOSSARY.md's.

    Attributes:
        slots: that regions have, all layers together.
        capacity_tokens: the same in working sets of one token.
        link_bytes_s, read_s, experts_s, stop_s, decode_tok_s, stall_share: with a link, its rate,
            what a read takes from computing, what of a token is computing experts, what a layer
            that is not passed takes more, the speed of decoding, and the share of the time that it
            waits for bytes; else None.
        requests_s: requests replayed in a second.
    """

    model: str
    cache: str
    allocation: str
    predictor: str
    capacity: float
    leases: bool
    slots: int
    capacity_tokens: float
    requests: int
    hits: int
    late: int
    misses: int
    hit_rate: float
    recall: float | None
    recall_top_k: float | None
    coverage: float | None
    accuracy: float | None
    evictions: int
    bytes_demand: int
    bytes_speculated: int
    bytes_wasted: int
    link_bytes_s: float | None
    read_s: float | None
    experts_s: float | None
    stop_s: float | None
    decode_tok_s: float | None
    stall_share: float | None
    requests_s: float


def check(cell: Cell) -> None:
    """Check a cell's names and numbers before anything runs.

    Raises:
        ConfigError: one is unknown or out of range.
    """
    if cell.cache != BELADY:
        make_policy_maker(cell.cache)
    make_regions(cell.allocation, [], 0, cell.shallow_layers)
    if not 0 < cell.capacity <= 1:
        raise ConfigError(f"capacity: {100 * cell.capacity:g} %: need more than 0, at most 100 %")


def make_policy_maker(cache: str, trace: Trace | None = None) -> MakePolicy:
    """Return what builds a policy by its name; `belady` only for a trace, whose future it knows.

    Raises:
        ConfigError: no such policy.
    """
    if cache == BELADY and trace is not None:
        return partial(Belady, future=future_of(trace))
    if cache not in CACHES:
        raise ConfigError(f"cache: {cache!r} is none of {', '.join(sorted([*CACHES, BELADY]))}")
    return partial(_by_name, cache)


def _by_name(cache: str, capacity_slots: int) -> EvictionPolicy:
    return make_cache(cache, capacity_slots)


def future_of(trace: Trace) -> dict[ExpertKey, list[int]]:
    """Return when each expert is asked for, counted in requests: what Belady knows."""
    future: dict[ExpertKey, list[int]] = {}
    now = 0
    for step in trace.steps:
        for choice in step.choices:
            for expert in choice.experts:
                future.setdefault(ExpertKey(choice.layer, expert), []).append(now)
                now += 1
    return future


def run_cell(cell: Cell, progress: Progress = no_progress) -> Row:
    """Replay one cell.

    Raises:
        ConfigError: an unknown name; FormatError: the trace is missing or damaged.
    """
    check(cell)
    trace = _cached_trace(cell.trace)
    slots = int(cell.capacity * sum(trace.experts))
    regions = make_regions(cell.allocation, trace.experts, slots, cell.shallow_layers)
    record_bytes = trace.record_bytes or (cell.expert_bytes,) * len(trace.experts)
    guesser = make_guesser(cell.predictor, trace)
    maker = make_policy_maker(cell.cache, trace)
    began_s = time.perf_counter()
    if cell.link is not None:
        spare = _spare_slots(trace, cell.predictor)
        timed = time_decode(
            trace, regions, maker, guesser, record_bytes, cell.link,
            spare_slots=spare, progress=progress,
        )  # fmt: skip
        return _row(cell, trace, regions, timed.found, timed, began_s)
    found = replay(
        trace, regions, maker, guesser, record_bytes, leases=_has_leases(cell), progress=progress
    )
    return _row(cell, trace, regions, found, None, began_s)


def _has_leases(cell: Cell) -> bool:
    if cell.leases is None:
        return cell.predictor != "none" or cell.link is not None
    return cell.leases


def _spare_slots(trace: Trace, predictor: str) -> int:
    """Return how many spare slots the engine would have, as in `Blueprint.share_out`."""
    if predictor == "none":
        return 2
    guesses = (guess for step in trace.steps for guess in step.guesses or ())
    widest = max((len(g.ranked) for g in guesses if g is not None), default=0)
    return max(trace.top_k, min(widest, max(trace.experts)))


def _row(
    cell: Cell,
    trace: Trace,
    regions: Regions,
    found: Replay,
    timed: Timed | None,
    began_s: float,
) -> Row:
    counts = found.total()
    would_miss = counts.misses + counts.saved
    return Row(
        model=trace.model,
        cache=cell.cache,
        allocation=cell.allocation,
        predictor=cell.predictor,
        capacity=cell.capacity,
        leases=_has_leases(cell),
        slots=regions.slots,
        capacity_tokens=regions.slots / (trace.top_k * len(trace.experts)),
        requests=counts.requests,
        hits=counts.hits,
        late=counts.late,
        misses=counts.misses,
        hit_rate=counts.hit_rate or 0.0,
        recall=counts.recall,
        recall_top_k=counts.recall_top_k,
        coverage=counts.saved / would_miss if found.guesses and would_miss else None,
        accuracy=found.guesses_used / found.guesses if found.guesses else None,
        evictions=found.evictions,
        bytes_demand=found.bytes_demand,
        bytes_speculated=found.bytes_speculated,
        bytes_wasted=found.bytes_wasted,
        link_bytes_s=cell.link.bytes_s if cell.link else None,
        read_s=cell.link.read_s if cell.link else None,
        experts_s=cell.link.experts_s if cell.link else None,
        stop_s=cell.link.stop_s if cell.link else None,
        decode_tok_s=timed.tok_s if timed else None,
        stall_share=timed.stall_s / timed.seconds if timed and timed.seconds else None,
        requests_s=counts.requests / (time.perf_counter() - began_s),
    )


def run_cells(
    cells: Sequence[Cell], jobs: int | None = None, progress: Progress = no_progress
) -> Iterator[Row]:
    """Replay cells side by side and yield their rows in order.

    Args:
        jobs: processes; None = one per core.
    Raises:
        ConfigError, FormatError: as `run_cell`, for any of the cells, before the first one runs.
    """
    for cell in cells:
        check(cell)
        make_guesser(cell.predictor, _cached_trace(cell.trace))
    jobs = min(jobs or os.cpu_count() or 1, len(cells))
    if jobs <= 1:
        for cell in cells:
            yield run_cell(cell, progress)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        progress("replaying", 0, len(cells))
        for done, row in enumerate(pool.map(run_cell, cells), start=1):
            progress("replaying", done, len(cells))
            yield row


@lru_cache(maxsize=4)
def _cached_trace(path: Path) -> Trace:
    return read_trace(path)
