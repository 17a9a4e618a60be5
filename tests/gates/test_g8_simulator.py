"""Gate 8: what the simulator counts is what the engine counted on the same run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from fate_moe.cache import make_cache
from fate_moe.engine.handle import Engine
from fate_moe.engine.record import Recorder
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.replay import Replay, replay
from fate_moe.sim.trace import Trace, read_trace
from fate_moe.sim.trace_file import write_packed
from fate_moe.types import Phase

Open = Callable[..., Engine]


@torch.no_grad()
def write(engine: Engine, tokens: int, path: Path) -> Trace:
    """Let a model write token by token, watched; return the trace, from the file."""
    with Recorder(engine) as recorder:
        engine.model.generate(
            torch.tensor([[7]]), attention_mask=torch.ones(1, 1), min_new_tokens=tokens,
            max_new_tokens=tokens, do_sample=True, pad_token_id=0,
        )  # fmt: skip
    write_packed(recorder.trace, path)
    return read_trace(path)


def replayed(engine: Engine, trace: Trace) -> Replay:
    table, cache = engine.mover.table, engine.blueprint.config.cache.cache
    return replay(
        trace, table.regions, partial(make_cache, cache), make_guesser("none", trace),
        trace.record_bytes or (), leases=True, spare_slots=table.spare_slots,
    )  # fmt: skip


@pytest.mark.parametrize("allocation", ["even", "shallow", "global"])
@pytest.mark.parametrize("cache", ["lru", "arc", "lfu", "s3fifo", "transition"])
def test_counts_are_the_engines(
    tiny_store: Path, open_engine: Open, tmp_path: Path, cache: str, allocation: str
) -> None:
    torch.manual_seed(0)
    engine = open_engine(
        tiny_store, policy="demand", cache=cache, allocation=allocation, experts="55%",
        shallow_layers=2,
    )  # fmt: skip
    trace = write(engine, 80, tmp_path / "t.trace")
    found, report = replayed(engine, trace), engine.report()
    counts = found.total(Phase.DECODE)
    assert trace.requests == report.requests > 1000
    assert report.misses > 100
    assert found.evictions > 50
    assert (counts.requests, counts.hits, counts.misses) == (
        report.requests, report.hits, report.misses,
    )  # fmt: skip
    assert (found.evictions, found.bytes_demand) == (report.evictions, report.bytes_demand)


def test_a_trace_holds_what_the_run_saw(
    tiny_store: Path, open_engine: Open, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    engine = open_engine(tiny_store, experts="55%", predictor="cross_layer", window=9)
    trace = write(engine, 30, tmp_path / "t.trace")
    report = engine.report()
    guessed = replay(
        trace, engine.mover.table.regions, partial(make_cache, "lru"),
        make_guesser("cross_layer", trace), trace.record_bytes or (), leases=True,
    ).total()  # fmt: skip
    assert (guessed.recall, guessed.recall_top_k) == (report.recall, report.recall_top_k)
    assert guessed.recall is not None
    assert trace.scores is not None
    assert trace.similarity is not None
    assert trace.scores.shape == (30, 6, 16)
    for number, step in enumerate(trace.steps):  # the highest scores are the chosen ones
        for choice in step.choices:
            best = trace.scores[number, choice.layer].argsort()[-3:]
            assert sorted(best.tolist()) == list(choice.experts)
    assert (abs(trace.similarity[:, 1:]) <= 1).all()
    assert all(layer.observer is None for layer in engine.layers)


def test_a_step_that_fails_is_left_out(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="55%")
    with Recorder(engine) as recorder:
        engine.model(torch.tensor([[1, 2, 3]]))
        hook = engine.model.model.layers[3].register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            engine.model(torch.tensor([[1]]))
        hook.remove()
        engine.model(torch.tensor([[2]]))
    assert [step.choices[0].tokens for step in recorder.trace.steps] == [3, 1]
    assert recorder.trace.steps[0].choices[0].counts is not None


def _fail(*_: object) -> None:
    raise ZeroDivisionError
