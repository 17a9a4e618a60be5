"""Counts of a replay are what a person would count."""

import json
import random
from collections import OrderedDict
from pathlib import Path

import cachetools
import pytest

from fate_moe.cache import CACHES
from fate_moe.errors import ConfigError, FormatError
from fate_moe.sim import present
from fate_moe.sim.sweep import BELADY, Cell, Row, run_cell, run_cells
from fate_moe.sim.trace import Step, Trace
from fate_moe.sim.trace_file import write_packed
from fate_moe.types import Choice, Prediction

LAYERS, EXPERTS, TOP_K = 3, 16, 3


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skewed routing with a memory: half of a step comes from the one before."""
    chance = random.Random(0)
    weights = [1 / (1 + rank) for rank in range(EXPERTS)]
    layers = [chance.sample(range(EXPERTS), TOP_K) for _ in range(LAYERS)]
    rows = []
    for _ in range(200):
        for layer in range(LAYERS):
            kept = set(chance.sample(layers[layer], 1))
            while len(kept) < TOP_K:
                kept.add(chance.choices(range(EXPERTS), weights)[0])
            layers[layer] = sorted(kept)
        rows.append({"layers": [list(ids) for ids in layers]})
    about = {"model": "made up", "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    path = tmp_path_factory.mktemp("traces") / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (about, *rows)), encoding="utf-8")
    return path


def cell(path: Path, cache: str = "lru", **changes: object) -> Cell:
    given = {"allocation": "even", "predictor": "none", "capacity": 0.25, **changes}
    return Cell(path, cache, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "theirs"), [("lru", cachetools.LRUCache), ("lfu", cachetools.LFUCache)]
)
@pytest.mark.parametrize("capacity", [0.125, 0.25, 0.5])
def test_counts_equal_cachetools(
    trace_file: Path, name: str, theirs: type[cachetools.Cache], capacity: float
) -> None:
    caches = [theirs(int(capacity * EXPERTS)) for _ in range(LAYERS)]
    hits = requests = 0
    for line in trace_file.read_text().splitlines()[1:]:
        for cache, ids in zip(caches, json.loads(line)["layers"], strict=True):
            for expert in ids:
                requests += 1
                if cache.get(expert):
                    hits += 1
                else:
                    cache[expert] = True
    row = run_cell(cell(trace_file, name, capacity=capacity))
    assert (row.requests, row.hits, row.misses, row.late) == (requests, hits, requests - hits, 0)
    assert row.bytes_demand == row.misses * 2**20


def test_nobody_beats_belady(trace_file: Path) -> None:
    for leases in (False, True):
        best = run_cell(cell(trace_file, BELADY, leases=leases)).hits
        for name in CACHES:
            assert run_cell(cell(trace_file, name, leases=leases)).hits <= best, name


def test_transition_beats_recency(trace_file: Path) -> None:
    assert run_cell(cell(trace_file, "transition")).hits > 1.1 * run_cell(cell(trace_file)).hits


def test_leases_lock_what_a_step_asks_for(trace_file: Path) -> None:
    # As many slots as a step asks for: a step never takes its own experts away.
    capacity = TOP_K / EXPERTS
    order: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(LAYERS)]
    hits = 0
    for line in trace_file.read_text().splitlines()[1:]:
        for resident, ids in zip(order, json.loads(line)["layers"], strict=True):
            hits += len(resident.keys() & set(ids))
            for expert in ids:
                resident.pop(expert, None)
            while len(resident) + len(ids) > TOP_K:
                resident.popitem(last=False)
            resident.update(dict.fromkeys(ids))
    row = run_cell(cell(trace_file, capacity=capacity, leases=True))
    assert row.hits == hits
    assert run_cell(cell(trace_file, capacity=capacity)).hits < hits


def test_an_oracle_leaves_no_miss(trace_file: Path) -> None:
    row = run_cell(cell(trace_file, predictor="oracle"))
    assert row.leases
    assert (row.hit_rate, row.misses, row.bytes_demand, row.bytes_wasted) == (1.0, 0, 0, 0)
    assert (row.recall, row.coverage, row.accuracy) == (1.0, 1.0, 1.0)
    assert row.bytes_speculated == (row.evictions + row.slots) * 2**20


def test_a_shared_region(trace_file: Path) -> None:
    row = run_cell(cell(trace_file, allocation="global", capacity=1.0))
    assert row.slots == LAYERS * EXPERTS
    assert row.evictions == 0
    shared = run_cell(cell(trace_file, "transition", allocation="global"))
    assert 0 < shared.hits < row.hits
    assert shared.evictions == shared.misses - shared.slots


@pytest.fixture
def guessed(tmp_path: Path) -> Path:
    steps = [
        Step([Choice(0, [0, 1]), Choice(1, [2, 3])], [None, Prediction(1, (2, 5), 1)]),
        Step([Choice(0, [0, 2]), Choice(1, [2, 4])], [None, Prediction(1, (4, 2, 6), 2)]),
    ]
    path = tmp_path / "g.trace"
    write_packed(Trace("tiny", (8, 8), 2, steps, (100, 1000), "cross_layer"), path)
    return path


def test_recorded_guesses(guessed: Path) -> None:
    row = run_cell(cell(guessed, predictor="cross_layer", capacity=0.875))
    # Layer 0: 0 1 | hit 0, 2. Layer 1: guess 2, miss 3 | hit 2, guess 4; 5 and 6 for nothing.
    assert (row.requests, row.hits, row.misses) == (8, 4, 4)
    assert row.bytes_demand == 3 * 100 + 1000
    assert (row.bytes_speculated, row.bytes_wasted) == (4000, 2000)
    assert (row.recall, row.recall_top_k) == (0.75, 0.75)
    assert (row.coverage, row.accuracy) == (2 / 6, 0.5)
    assert row.capacity_tokens == 14 / 4


def test_rows_come_in_order_from_several_processes(trace_file: Path) -> None:
    cells = [cell(trace_file, name, capacity=c) for name in ("lru", "arc") for c in (0.25, 0.5)]
    told: list[tuple[int, int]] = []
    rows = list(run_cells(cells, 2, lambda what, done, total: told.append((done, total))))
    assert [(row.cache, row.capacity) for row in rows] == [
        ("lru", 0.25), ("lru", 0.5), ("arc", 0.25), ("arc", 0.5)
    ]  # fmt: skip
    assert told[-1] == (4, 4)
    alone = [run_cell(one) for one in cells]
    assert [row.hits for row in rows] == [row.hits for row in alone]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cache": "lfuu"}, "cache: 'lfuu' is none of arc, belady, guarded"),
        ({"allocation": "deep"}, "allocation: 'deep' is none of even, global, shallow"),
        ({"predictor": "psychic"}, "predictor: 'psychic' is none of none, oracle, recorded for"),
        ({"predictor": "recorded"}, "the trace holds no guesses"),
        ({"capacity": 0.0}, "capacity: 0 %: need more than 0"),
    ],
)
def test_bad_cells_are_refused_before_anything_runs(
    trace_file: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        next(run_cells([cell(trace_file), cell(trace_file, **changes)], 1))  # type: ignore[arg-type]


def test_a_missing_trace_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="absent"):
        next(run_cells([cell(tmp_path / "absent")]))


def test_a_table_says_how_far_from_lru_to_belady(trace_file: Path) -> None:
    rows = [run_cell(cell(trace_file, name)) for name in ("lru", "transition", BELADY)]
    head, cells = present.table(rows)
    closed = [row[head.index("gap closed")] for row in cells]
    assert (closed[0], closed[2]) == ("+0.00", "+1.00")
    assert 0 < float(closed[1]) < 1
    assert _alone(rows[0]) == "-"


def _alone(row: Row) -> str:
    head, cells = present.table([row])
    return cells[0][head.index("gap closed")]
