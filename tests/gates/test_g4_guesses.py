"""G4: a guess costs nobody else anything: no chosen expert its slot, no more bytes than allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.cache import Entry
from fate_moe.engine import Engine
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.models.load import load_tokenizer
from fate_moe.types import Phase
from tests.conftest import Open


def watch(engine: Engine) -> list[str]:
    """Record every time that placing a guess pushed out a chosen or leased expert."""
    table = engine.mover.table
    place: Callable[[Any], Entry | None] = table.place_guess
    broken: list[str] = []

    def watched(key: Any) -> Entry | None:
        before = {e.key: (e.used, e.locks) for e in table.entries()}
        evictions = table.evictions
        entry = place(key)
        gone = before.keys() - {e.key for e in table.entries()}
        broken.extend(f"{k} {before[k]}" for k in gone if any(before[k]))
        if table.evictions != evictions:
            broken.append("a region's expert was evicted")
        return entry

    table.place_guess = watched  # type: ignore[method-assign]
    return broken


def generate(engine: Engine) -> None:
    engine.model.generate(
        torch.arange(3, 40)[None], max_new_tokens=40, do_sample=False, eos_token_id=None
    )


@pytest.mark.parametrize("experts", ["8%", "25%", "50%", "75%"])
@pytest.mark.parametrize("allocation", ["shallow", "even"])
def test_a_guess_evicts_nobody_chosen_or_leased(
    experts: str, allocation: str, tiny_store: Path, open_engine: Open
) -> None:
    engine = open_engine(tiny_store, experts=experts, allocation=allocation, window=9)
    broken = watch(engine)
    generate(engine)
    assert broken == []
    report = engine.report()
    assert report.guesses > 20
    assert report.bytes_wasted > 0  # guesses did push out other guesses


@pytest.mark.smolmoe
def test_on_smolmoe_too(smolmoe_store: Path, open_engine: Open) -> None:
    engine = open_engine(smolmoe_store, experts="15%", window=6)
    broken = watch(engine)
    engine.model.generate(torch.arange(30, 50)[None], max_new_tokens=6, do_sample=False)
    assert broken == []
    report = engine.report()
    assert report.bytes_wasted > 0
    assert report.guesses <= 6 * 7 * (len(report.per_layer) - 1)  # window x steps x layers
    engine.mover.table.check()


def test_guesses_stay_within_their_byte_budget(tiny_store: Path, open_engine: Open) -> None:
    issued: list[int] = []
    for window in (0, 1, 3):
        engine = open_engine(tiny_store, experts="25%", window=window)
        generate(engine)
        report = engine.report()
        turns = 40 * (len(report.per_layer) - 1)  # a guess is made for every layer but the first
        assert report.guesses <= window * turns
        assert report.bytes_speculated == report.guesses * report.expert_bytes
        issued.append(report.guesses)
    assert issued[0] == 0 < issued[1] < issued[2]


def test_the_measured_window_closes_on_a_slow_link(tiny_store: Path, open_engine: Open) -> None:
    quick = open_engine(tiny_store, experts="25%")
    generate(quick)
    # Longer per read than a whole layer computes: nothing can hide behind it.
    slow = open_engine(tiny_store, delay=0.02, experts="25%", io_threads=1)
    generate(slow)
    assert quick.report().guesses > 20
    assert slow.report().guesses < quick.report().guesses / 3


@pytest.mark.smolmoe
def test_smolmoe_guesses_from_the_maps_it_comes_with(
    smolmoe_store: Path, open_engine: Open
) -> None:
    """The default predictor: recall of at least 0.97 with nothing fitted by the user."""
    engine = open_engine(smolmoe_store, experts="50%", window=99)
    ask = [{"role": "user", "content": "Write a short story about a river."}]
    answer = Conversation(engine, load_tokenizer(smolmoe_store)).ask(ask, Sampling(48))
    assert answer.new_tokens > 20
    counts = engine.mover.telemetry.total(Phase.DECODE)
    assert counts.recall is not None
    assert counts.recall >= 0.97
    assert counts.hits + counts.late >= 0.95 * counts.requests
    assert "predictor ridge, cache" in engine.mode
