"""Two bits are read, not only computed: fewer bytes, and still the same output everywhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fate_moe.engine.handle import Engine
from fate_moe.engine.prepare import convert_model
from fate_moe.memory.arena import Arena
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import FileReader
from fate_moe.types import ExpertKey, Phase, Prediction
from tests import tiny
from tests.conftest import Open

HYBRID = {"int2": "tail", "int2_share": 0.5}
PROMPT, TOKENS = torch.arange(3, 60)[None], 12


@torch.no_grad()
def answer(engine: Engine) -> list[Tensor]:
    """Read a prompt and write on; the logits of every step."""
    out = engine.model(PROMPT, use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for _ in range(TOKENS):
        ids = logits[-1][:, -1:].argmax(-1)
        logits.append(engine.model(ids, past_key_values=cache, use_cache=True).logits)
    return logits


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of more than one page."""
    folder = tmp_path_factory.mktemp("wide")
    checkpoint = tiny.save_checkpoint(folder / "checkpoint", moe_intermediate_size=128)
    convert_model(str(checkpoint), folder / "store", cache_dir=folder)
    return folder / "store"


@pytest.fixture(params=["eager", "native"])
def compute(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("policy", ["demand", "fate", "tuned"])
@pytest.mark.parametrize("experts", ["15%", "50%", "90%"])
def test_the_output_does_not_depend_on_what_was_read_in_two_bits(
    wide_store: Path, open_engine: Open, policy: str, experts: str, compute: str
) -> None:
    want = answer(open_engine(wide_store, policy="resident", compute=compute, **HYBRID))
    engine = open_engine(
        wide_store, policy=policy, experts=experts, compute=compute, window=9, **HYBRID
    )
    have = answer(engine)
    for number, (a, b) in enumerate(zip(have, want, strict=True)):
        assert torch.equal(a, b), f"step {number}"
    telemetry = engine.mover.telemetry
    # Guesses may make every head whole ahead of its need; with few slots hardly one stays so long.
    if policy == "demand" and experts != "15%":
        assert telemetry.total(Phase.DECODE).partial > 0
    assert engine.mover.table.evictions > 0 or experts == "90%"


def test_a_prompts_guesses_are_heads_where_those_are_guessed_to_be_enough(
    wide_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(wide_store, policy="tuned", experts="50%", **HYBRID)
    seen: list[Prediction] = []
    speculate = engine.mover.speculate

    def spy(guess: Prediction | None) -> None:
        seen.extend([guess] if guess else [])
        speculate(guess)

    monkeypatch.setattr(engine.mover, "speculate", spy)
    with torch.no_grad():
        engine.model(PROMPT)
    assert len(seen) == 5  # for every layer but the first
    for guess in seen:
        assert guess.counts is not None
        assert guess.low
        low = sum(n for e, n in zip(guess.ranked, guess.counts, strict=True) if e in guess.low)
        assert low <= 0.5 * sum(guess.counts)


def test_heads_are_fewer_bytes(wide_store: Path, open_engine: Open) -> None:
    moved = {}
    for share in (0.0, 0.5, 1.0):
        engine = open_engine(
            wide_store, policy="demand", experts="25%", int2="tail", int2_share=share
        )
        with torch.no_grad():
            engine.model(PROMPT)
        moved[share] = engine.report().bytes_demand
    (layer, *_) = read_manifest(wide_store).layers
    assert moved[1.0] == pytest.approx(
        moved[0.0] * layer.head_read_bytes / layer.record_bytes, rel=0.1
    )
    assert moved[1.0] < moved[0.5] < moved[0.0]


@pytest.fixture(scope="module")
def reader(wide_store: Path) -> Iterator[FileReader]:
    made = FileReader(wide_store, read_manifest(wide_store))
    yield made
    made.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 15))
def test_a_head_made_whole_is_the_record(reader: FileReader, layer: int, expert: int) -> None:
    key, whole = ExpertKey(layer, expert), reader.record_bytes(layer)
    head = reader._layers[layer].head_read_bytes
    assert 0 < head < whole
    arena = Arena(2, whole)
    upgraded, fresh = arena.view(0), arena.view(1)
    reader.read_into(key, upgraded, 0, head)
    reader.read_into(key, upgraded[head:], head, whole - head)
    reader.read_into(key, fresh)
    assert upgraded == fresh
