"""G1: any cache, policy, predictor and timing gives the output of everything resident.

G2 rides along: each gate proves that its feature ran.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fate_moe.engine import Engine
from fate_moe.engine.generate import Answer, Conversation, Sampling
from fate_moe.models.load import load_tokenizer, own_memory, quiet_transformers
from fate_moe.quant.codec import decode
from fate_moe.quant.record import RecordLayout
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import FileReader
from fate_moe.types import ExpertKey
from tests.conftest import Open

PROMPT = "Fate streams experts."
NEW_TOKENS = 24


def logits(engine: Engine, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = engine.model(ids).logits
    return out


def tokens(engine: Engine, prompt: Tensor) -> list[int]:
    out: list[int] = engine.model.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )[0].tolist()
    return out


@pytest.fixture(scope="module")
def prompt(tiny_store: Path) -> Tensor:
    ids: Tensor = load_tokenizer(tiny_store)(PROMPT, return_tensors="pt")["input_ids"]
    return ids


Oracle = tuple[Tensor, list[int]]


@pytest.fixture(scope="module")
def oracles(tiny_store: Path, prompt: Tensor) -> dict[str, Oracle]:
    """Everything resident, by compute path: each path must repeat itself bit for bit."""
    from fate_moe.config import make_config
    from fate_moe.engine import build

    results = {}
    for compute in ("eager", "native"):
        engine = build(tiny_store, make_config("resident", compute=compute))
        results[compute] = logits(engine, prompt), tokens(engine, prompt)
        assert engine.compute.name == compute
        assert engine.report().misses == 0
        engine.close()
    return results


@pytest.fixture(scope="module")
def oracle(oracles: dict[str, Oracle]) -> Oracle:
    return oracles["eager"]


def jitter(key: ExpertKey) -> float:
    """Delays that scramble the order of arrival."""
    return (hash((key.layer * 31 + key.expert) * 2654435761) % 7) / 4000


CASES: list[dict[str, Any]] = [
    {"policy": "demand", "experts": "25%"},
    {"policy": "demand", "experts": "50%", "cache": "lru", "allocation": "even"},
    {"experts": "25%", "window": 8},
    {"experts": "25%", "window": 8, "io_threads": 1},
    {"experts": "50%", "window": 8, "allocation": "even"},
    {"experts": "50%", "window": 2, "cache": "lru"},
    {"experts": "75%"},
    {"experts": "4%", "window": 8},
]


@pytest.mark.parametrize("delay", [None, jitter], ids=["quick", "jitter"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("compute", ["eager", "native"])
def test_output_equals_everything_resident(
    case: dict[str, Any],
    compute: str,
    delay: Any,
    tiny_store: Path,
    prompt: Tensor,
    oracles: dict[str, Oracle],
    open_engine: Open,
) -> None:
    engine = open_engine(tiny_store, delay=delay, compute=compute, **case)
    assert torch.equal(logits(engine, prompt), oracles[compute][0])
    assert tokens(engine, prompt) == oracles[compute][1]
    report = engine.report()
    assert report.misses > 0
    assert report.evictions > 0 or case["experts"] == "4%"
    assert report.hits + report.late + report.misses == report.requests
    assert (report.guesses > 0) == (case.get("policy") != "demand")
    engine.mover.table.check()


def test_late_guesses_change_nothing(
    tiny_store: Path, prompt: Tensor, oracle: Oracle, open_engine: Open
) -> None:
    engine = open_engine(
        tiny_store, delay=0.004, experts="40%", allocation="even", window=8, compute="eager"
    )
    assert torch.equal(logits(engine, prompt), oracle[0])
    assert tokens(engine, prompt) == oracle[1]
    report = engine.report()
    assert report.late > 0
    assert report.guesses_used > 0
    assert report.evictions > 0
    assert report.stall_s > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exact_in_16_bits_too(
    dtype: str, tiny_store: Path, prompt: Tensor, open_engine: Open
) -> None:
    whole = open_engine(tiny_store, policy="resident", dtype=dtype)
    part = open_engine(tiny_store, delay=jitter, experts="25%", window=8, dtype=dtype)
    assert torch.equal(logits(whole, prompt), logits(part, prompt))
    assert tokens(whole, prompt) == tokens(part, prompt)
    assert part.report().evictions > 0
    assert dtype in part.mode


def test_equals_plain_transformers_with_the_decoded_weights(
    tiny_store: Path,
    tiny_checkpoint: Path,
    prompt: Tensor,
    oracle: Oracle,
) -> None:
    """The oracle itself: transformers' own eager experts, given what the records hold."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(
            tiny_checkpoint, dtype=torch.float32, experts_implementation="eager"
        )
    own_memory(plain, whole=True)
    manifest = read_manifest(tiny_store)
    reader = FileReader(tiny_store, manifest)
    for index, entry in enumerate(manifest.layers):
        module = plain.get_submodule(entry.path)
        record = torch.zeros(entry.record_bytes, dtype=torch.uint8)
        for expert in range(entry.num_experts):
            reader.read_into(ExpertKey(index, expert), memoryview(record.numpy().data))
            weights = decode(RecordLayout.from_json(entry.layout), record, torch.float32)
            for name, value in weights.items():
                getattr(module, name).data[expert] = value
    reader.close()
    with torch.no_grad():
        assert torch.equal(plain(prompt).logits, oracle[0])
    out = plain.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert out[0].tolist() == oracle[1]


def test_native_differs_from_eager_by_the_rounding_of_activations(
    oracles: dict[str, Oracle],
) -> None:
    eager, native = oracles["eager"][0], oracles["native"][0]
    assert not torch.equal(eager, native)
    # Of most positions: where two experts of a random router are nearly even, rounding picks one.
    off = (eager - native).norm(dim=-1) / eager.norm(dim=-1)
    assert off.median() < 0.02


def test_the_oracle_is_not_trivial(oracle: Oracle) -> None:
    assert len(set(oracle[1])) > NEW_TOKENS // 3


@pytest.mark.smolmoe
def test_smolmoe_answers_alike_under_every_policy(smolmoe_store: Path, open_engine: Open) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answers: dict[str, Answer] = {}
    for name, choices in {
        "resident": {"policy": "resident"},
        "tuned": {"experts": "25%"},
        "fate": {"policy": "fate", "experts": "25%"},
        "fate, slow disk": {"policy": "fate", "experts": "25%", "window": 6, "delay": 0.004},
        "demand": {"policy": "demand", "experts": "25%"},
    }.items():
        engine = open_engine(smolmoe_store, **choices)
        conversation = Conversation(engine, load_tokenizer(smolmoe_store))
        answers[name] = conversation.ask(question, Sampling(max_new_tokens=24))
        report = engine.report()
        if name != "resident":
            assert report.evictions > 0
        if name.startswith(("fate", "tuned")):
            assert report.guesses_used > 0
        if "slow" in name:
            assert report.late > 0
    for answer in answers.values():
        assert answer.token_ids == answers["resident"].token_ids
    assert "Paris" in answers["resident"].text
