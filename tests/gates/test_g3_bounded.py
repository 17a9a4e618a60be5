"""G3: the plan comes before the first byte, and no run takes more than its plan."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.bench import cgroup
from fate_moe.bench.sets import own_text
from fate_moe.errors import BudgetError, ConfigError
from tests.conftest import Open


def test_refuses_before_it_reads(
    tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("weights were read before the plan was made")

    monkeypatch.setattr(sys.modules["fate_moe.engine.build"], "load_residents", read)
    with pytest.raises(BudgetError, match=r"have 1\.0 MiB, need at least .* try --ram \d+MiB") as e:
        open_engine(tiny_store, ram="1MiB")
    assert e.value.floor_bytes > e.value.budget_bytes == 2**20


def test_the_floor_itself_runs(tiny_store: Path, open_engine: Open) -> None:
    with pytest.raises(BudgetError) as error:
        open_engine(tiny_store, ram="1MiB")
    engine = open_engine(tiny_store, ram=error.value.floor_bytes + 2**20)
    assert engine.report().planned_bytes <= engine.report().budget_bytes


def test_fewer_slots_than_the_floor_are_refused(tiny_store: Path, open_engine: Open) -> None:
    with pytest.raises(BudgetError, match="experts: have 0 slots, need at least 3"):
        open_engine(tiny_store, experts="0%")


def test_regions_and_spare_slots_are_the_plan(tiny_store: Path, open_engine: Open) -> None:
    for share in ("10%", "33%", "50%", "99%"):
        engine = open_engine(tiny_store, experts=share)
        table = engine.mover.table
        assert table.regions.slots + table.spare_slots == engine.blueprint.memory.slots
        assert engine.report().experts_capacity == engine.blueprint.memory.slots


def test_a_step_beyond_the_planned_context_is_refused(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="50%", context_tokens=64)
    engine.model(torch.arange(3, 67)[None])
    with pytest.raises(ConfigError, match="1 x 65 tokens, the plan has room for 64"):
        engine.model(torch.arange(3, 68)[None])
    with pytest.raises(ConfigError, match="2 x 40 tokens"):
        engine.model(torch.arange(3, 43).repeat(2, 1))
    with pytest.raises(ConfigError, match="1 x 65 tokens"):
        engine.model.generate(torch.arange(3, 60)[None], max_new_tokens=20, do_sample=False,
                              eos_token_id=None)  # fmt: skip


def test_generate_splits_long_prompts_by_itself(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="50%")
    engine.model.generation_config.prefill_chunk_size = 50
    lengths: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine.model.generate(torch.arange(3, 123)[None], max_new_tokens=2, do_sample=False)
    assert lengths[:3] == [50, 50, 20]


RUN = """
import json, sys
from pathlib import Path
from fate_moe.config import make_config
from fate_moe.engine import build
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.models.load import load_tokenizer
store = Path(sys.argv[1])
engine = build(store, make_config(ram=sys.argv[2], context_tokens=1024, window=6))
prompt = "The history of the city begins with a river. " * 80
tokenizer = load_tokenizer(store)
answer = Conversation(engine, tokenizer).ask(prompt, Sampling(max_new_tokens=16))
engine.model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=4)
report = engine.report()
print(json.dumps({
    "peak": report.peak_rss_bytes, "budget": report.budget_bytes, "planned": report.planned_bytes,
    "floor": report.floor_bytes, "evictions": report.evictions, "slots": report.experts_capacity,
    "prompt": answer.prompt_tokens, "text": answer.text,
}))
"""


def run_smolmoe(store: Path, ram: str, limit_bytes: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(store), ram]
    if limit_bytes is not None:
        command = cgroup.limited(command, limit_bytes)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.smolmoe
def test_the_peak_stays_within_the_plan(smolmoe_store: Path) -> None:
    run = run_smolmoe(smolmoe_store, "1200MiB")
    assert run["prompt"] > 512  # longer than one prefill chunk
    assert run["peak"] <= run["planned"] <= run["budget"]


@pytest.mark.smolmoe
def test_runs_in_a_memory_cgroup_of_its_budget(smolmoe_store: Path) -> None:
    reason = cgroup.unavailable()
    if reason:
        pytest.skip(f"no memory cgroup can be made here: {reason}")
    budget = 1200 * 2**20
    run = run_smolmoe(smolmoe_store, "1200MiB", limit_bytes=budget)
    assert run["peak"] <= budget


@pytest.mark.smolmoe
def test_evaluating_stays_within_the_plan(smolmoe_store: Path, tmp_path: Path) -> None:
    """With a reference and questions: the scores of 64 tokens at once, twice, and no more."""
    questions = tmp_path / "animals.jsonl"
    row = {"query": "Which animal says meow?", "choices": ["a cat", "a dog"], "gold": 0}
    questions.write_text("\n".join([json.dumps(row)] * 20))
    text = tmp_path / "text.txt"
    text.write_text(own_text(), encoding="utf-8")
    fate = str(Path(sys.executable).parent / "fate")
    limits = ["--ram", "1300MiB", "--experts", "50%", "--context", "1024"]
    store = str(smolmoe_store)
    command = [fate, "eval", store, "--against", store, "--tokens", "1024", "--json"]
    command += ["--questions", str(questions), "--text", str(text)]
    done = subprocess.run(
        [*command, *limits], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads(done.stdout)
    assert run["kl"] == 0
    assert run["asked"] == {"animals": 20}
    assert run["evictions"] > 0
    assert run["peak_rss_bytes"] <= run["planned_bytes"] <= run["budget_bytes"]
