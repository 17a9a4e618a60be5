"""Decode that depends on what is in memory: only where it is asked for, and then only there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fate_moe.cache.table import Part
from fate_moe.config import make_config
from fate_moe.engine.build import build
from fate_moe.engine.handle import Engine
from fate_moe.engine.plan import draw
from fate_moe.engine.prepare import convert_model
from fate_moe.errors import ConfigError
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests import tiny
from tests.conftest import Open
from tests.families.exact import save_published

PROMPT, TOKENS = torch.arange(3, 30)[None], 24
SMALL = {"policy": "demand", "experts": "25%"}


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of more than one page: their heads are fewer bytes."""
    folder = tmp_path_factory.mktemp("wide")
    return tiny.save_checkpoint(folder / "checkpoint", moe_intermediate_size=128)


@pytest.fixture(scope="module")
def wide_store(wide_checkpoint: Path) -> Path:
    out = wide_checkpoint.parent / "store"
    convert_model(str(wide_checkpoint), out, cache_dir=out.parent)
    return out


@torch.no_grad()
def answer(engine: Engine) -> list[Tensor]:
    """Read a prompt, start counting, write the same tokens whatever comes; logits of each step."""
    out = engine.model(PROMPT, use_cache=True)
    engine.reset()
    logits, cache = [out.logits], out.past_key_values
    for token in range(TOKENS):
        ids = torch.tensor([[(37 * token) % 300]])
        logits.append(engine.model(ids, past_key_values=cache, use_cache=True).logits)
    return logits


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Watched:
    """Notes, of each decode step of each layer, what was chosen and how it was computed."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[dict[int, float], dict[int, bool]]] = []
        for layer in engine.layers:
            layer.experts = self._around(layer.experts, layer.layer, engine)
            layer.observer = self  # so that no layer is passed

    def asked(self, layer: int, gate_input: Tensor, guess: Prediction | None) -> None:
        pass

    def sharpened(self, guess: Prediction) -> None:
        pass

    def chose(self, choice: Choice) -> None:
        pass

    def _around(self, experts: Any, number: int, engine: Engine) -> Any:
        def watching(x: Tensor, ids: Tensor, weights: Tensor, arriving: Any) -> Tensor:
            low: dict[int, bool] = {}

            def noting() -> Iterator[list[tuple[int, int, bool]]]:
                for landed in arriving:
                    for expert, _, is_low in landed:
                        entry = engine.mover.table.get(ExpertKey(number, expert))
                        assert entry is not None
                        # What is whole in its slot is computed whole, and only that can be.
                        assert is_low == (entry.part is Part.HEAD)
                        low[expert] = is_low
                    yield landed

            out: Tensor = experts(x, ids, weights, noting())
            if len(ids) == 1:
                shares = weights[0] / weights[0].sum()
                chosen = dict(zip(ids[0].tolist(), shares.tolist(), strict=True))
                self.steps.append((chosen, low))
            return out

        return watching


@pytest.mark.parametrize("compute", ["eager", "native"])
def test_off_by_default_and_to_the_bit(wide_store: Path, open_engine: Open, compute: str) -> None:
    resident = open_engine(wide_store, policy="resident", compute=compute)
    want = answer(resident)
    for choices in ({}, {"exact": True}, {"int2_on_miss": 0.0, "routing_bias": 0.0}):
        engine = open_engine(wide_store, compute=compute, **SMALL, **choices)
        assert same(answer(engine), want)
        report = engine.report()
        assert report.misses > 0
        assert report.low == report.rerouted == 0
        assert report.mode.endswith("exact: the answer does not depend on what is in memory")


@pytest.mark.parametrize("compute", ["eager", "native"])
def test_a_missing_light_expert_is_its_head_and_nothing_else_is(
    wide_store: Path, open_engine: Open, compute: str
) -> None:
    exact = open_engine(wide_store, compute=compute, **SMALL)
    want = answer(exact)
    engine = open_engine(wide_store, compute=compute, int2_on_miss=0.3, **SMALL)
    watched = Watched(engine)
    have = answer(engine)
    assert torch.equal(have[0], want[0])  # the prompt
    assert not same(have, want)
    ways = [(share < 0.3, low[e]) for shares, low in watched.steps for e, share in shares.items()]
    assert len(ways) == tiny.LAYERS * tiny.TOP_K * TOKENS
    assert (False, True) not in ways
    assert min(ways.count(way) for way in ((True, True), (True, False), (False, False))) > 0
    report = engine.report()
    assert report.low == ways.count((True, True)) == report.phases[Phase.DECODE.value]["low"]
    assert report.bytes_demand < exact.report().bytes_demand
    assert "below 30% of a token's router weights computed from two bits" in report.mode
    assert report.mode.endswith("; the answer depends on what is in memory")
    assert f", {report.low} in two bits" in dict(report.rows())["requests"]


def test_where_nothing_misses_nothing_changes(wide_store: Path, open_engine: Open) -> None:
    want = answer(open_engine(wide_store, policy="resident"))
    engine = open_engine(wide_store, policy="resident", int2_on_miss=1.0)
    assert same(answer(engine), want)
    assert engine.report().low == 0


def test_guesses_make_heads_whole(wide_store: Path, open_engine: Open) -> None:
    engine = open_engine(wide_store, policy="tuned", experts="25%", window=99, int2_on_miss=1.0)
    Watched(engine)
    answer(engine)
    report = engine.report()
    assert 0 < report.low < report.requests
    assert report.guesses_used > 0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_store_without_heads_is_refused(wide_checkpoint: Path, tmp_path: Path, bits: int) -> None:
    convert_model(str(wide_checkpoint), tmp_path / "store", cache_dir=tmp_path, bits=bits)
    with pytest.raises(ConfigError, match="int2_on_miss: the store holds experts of (8|32) bits"):
        draw(tmp_path / "store", make_config(int2_on_miss=0.15))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="int2_on_miss: have .* need 0 to 1"):
        make_config(int2_on_miss=share)


def test_exact_forbids_what_is_not() -> None:
    make_config(exact=True, int2="tail")  # prompts have their own switch
    with pytest.raises(ConfigError, match=r"exact: with int2_on_miss 12\.5%"):
        make_config(exact=True, int2_on_miss=0.125)
    with pytest.raises(ConfigError, match=r"exact: with routing_bias 0\.5 .*--routing-bias"):
        make_config(exact=True, routing_bias=0.5)


@pytest.mark.parametrize("compute", ["eager", "native"])
@pytest.mark.parametrize("policy", ["demand", "tuned"])
def test_a_bias_finds_more_experts_in_memory(
    wide_store: Path, open_engine: Open, compute: str, policy: str
) -> None:
    choices: dict[str, Any] = {
        "policy": policy, "experts": "40%", "allocation": "even", "compute": compute,
    }  # fmt: skip
    exact = open_engine(wide_store, **choices)
    want = answer(exact)
    plain = exact.report()
    found = []
    for bias in (2.0, 1e6):
        engine = open_engine(wide_store, routing_bias=bias, **choices)
        have = answer(engine)
        assert torch.equal(have[0], want[0])  # the prompt
        assert not same(have, want)
        report = engine.report()
        assert report.requests == plain.requests
        assert report.rerouted > 0
        assert f", {report.rerouted} rerouted" in dict(report.rows())["requests"]
        assert f"logits of experts in memory raised by {bias:g}; the answer dep" in report.mode
        found.append(report)
    some, most = found
    assert plain.misses > some.misses > most.misses
    moved = [one.bytes_demand + one.bytes_speculated for one in (plain, some, most)]
    assert policy == "tuned" or moved == sorted(moved, reverse=True)
    assert most.misses == 0  # each layer has more slots than a token takes


def test_a_bias_changes_nothing_where_every_expert_has_a_slot(
    wide_store: Path, open_engine: Open
) -> None:
    want = answer(open_engine(wide_store, policy="resident"))
    engine = open_engine(wide_store, policy="resident", routing_bias=1e6)
    assert same(answer(engine), want)
    assert engine.report().rerouted == 0
    assert "raised by 1e+06 (no effect: every expert has a slot)" in engine.mode
    assert engine.mode.endswith("exact: the answer does not depend on what is in memory")


def test_routers_without_a_softmax_are_refused(tmp_path: Path) -> None:
    save_published("glm4_moe", tmp_path / "checkpoint")
    convert_model(str(tmp_path / "checkpoint"), tmp_path / "store", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="routing_bias: the routers of glm4_moe do not take"):
        build(tmp_path / "store", make_config(experts="50%", routing_bias=0.5))


@pytest.mark.parametrize("bias", [-0.1, float("inf"), float("nan")])
def test_bad_biases_are_refused(bias: float) -> None:
    with pytest.raises(ConfigError, match="routing_bias: have .* need 0 or more"):
        make_config(routing_bias=bias)
