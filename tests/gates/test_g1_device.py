"""G1 and G3 with the experts' slots on a GPU; without one, on a device that is none.

`scripts/gpu_check.py` runs this file on a card.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.tasks import divergence
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.budget import MemoryPlan, make_plan
from fate_moe.config import DEFAULT_POLICY, make_config
from fate_moe.engine import Engine, build
from fate_moe.engine.calibrate import calibrate
from fate_moe.engine.demands import tiers_of
from fate_moe.engine.device import PinnedRecords
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.engine.prepare import convert_model
from fate_moe.errors import BudgetError, ConfigError, ReadError
from fate_moe.memory.device import Card, CudaCard, DeviceArena
from fate_moe.models.load import load_tokenizer
from fate_moe.prefetch.copies import CopyEngine
from fate_moe.prefetch.staged import StagedReader
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import FileReader
from fate_moe.types import ExpertKey
from tests import tiny
from tests.cards import FakeCard

ON_CARD = torch.cuda.is_available()
PROMPT = "Fate streams experts."

Outcome = tuple[Tensor, list[int]]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    one: Card = CudaCard() if ON_CARD else FakeCard()
    monkeypatch.setattr("fate_moe.engine.plan.open_card", lambda: one)
    return one


Open = Callable[..., Engine]


@pytest.fixture
def on_device(card: Card, tiny_store: Path) -> Iterator[Open]:
    """Build engines that compute on the device, and close them."""
    engines: list[Engine] = []

    def make(
        store: Path = tiny_store,
        *,
        policy: str = DEFAULT_POLICY,
        slowed: Any = None,
        **choices: Any,
    ) -> Engine:
        settings = {"vram": "4GiB", "dtype": "float32", **choices}
        extra = {} if slowed is None else {"slowed": slowed}
        engines.append(build(store, make_config(policy, **settings), **extra))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert not getattr(card, "pinned", [])


def outcome(engine: Engine, store: Path, new_tokens: int, prompt: str = PROMPT) -> Outcome:
    ids = load_tokenizer(store)(prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(engine.blueprint.device)
    with torch.no_grad():
        logits = engine.model(ids).logits.cpu()
    out = engine.model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    return logits, out[0].tolist()


def same(one: Outcome, other: Outcome) -> bool:
    return torch.equal(one[0], other[0]) and one[1] == other[1]


CASES: list[dict[str, Any]] = [
    {"policy": "demand", "experts": "25%"},
    {"experts": "25%", "window": 8},
    {"experts": "50%", "policy": "fate"},
    {"experts": "50%", "window": 2, "cache": "lru", "allocation": "even"},
    {"experts": "4%", "window": 8},
]


@pytest.mark.parametrize("int2", ["never", "tail"])
def test_eager_equals_everything_resident(on_device: Open, tiny_store: Path, int2: str) -> None:
    whole = outcome(on_device(policy="resident", compute="eager", int2=int2), tiny_store, 24)
    if not ON_CARD:
        host = build(tiny_store, make_config("resident", compute="eager", int2=int2))
        assert same(whole, outcome(host, tiny_store, 24))
        host.close()
    late = 0
    for case in CASES:
        engine = on_device(compute="eager", int2=int2, **case)
        assert same(outcome(engine, tiny_store, 24), whole), case
        report = engine.report()
        assert report.misses > 0
        assert report.evictions > 0
        assert (report.guesses > 0) == (case.get("policy") != "demand")
        late += report.late
        engine.mover.table.check()
        assert isinstance(engine.reader, CopyEngine)
        assert "copies from pinned memory" in engine.mode
    assert late > 0 or ON_CARD


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for Triton's interpreter, which takes seconds for a token."""
    folder = tmp_path_factory.mktemp("two-layers")
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
    source = tiny.save_checkpoint(folder / "checkpoint", **sizes)
    convert_model(str(source), folder / "store", cache_dir=folder)
    return folder / "store"


def test_triton_equals_itself_and_nearly_eager(
    on_device: Open, two_layers: Path, tiny_store: Path
) -> None:
    pytest.importorskip("triton")
    few = (tiny_store, 24, PROMPT) if ON_CARD else (two_layers, 4, PROMPT[:3])
    whole = outcome(on_device(few[0], policy="resident"), *few)
    exact = outcome(on_device(few[0], policy="resident", compute="eager"), *few)
    assert float((whole[0] - exact[0]).norm() / exact[0].norm()) < 1e-4
    for case in CASES if ON_CARD else [{"experts": "40%", "window": 2, "allocation": "global"}]:
        engine = on_device(few[0], **case)
        assert same(outcome(engine, *few), whole), case
        report = engine.report()
        assert report.misses > 0 < report.evictions
        assert (report.guesses > 0) == (case.get("policy") != "demand")
        assert "computed by Triton kernels" in report.mode


def test_records_that_find_no_room_in_memory_come_from_disk(
    on_device: Open, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(on_device(policy="resident", compute="eager"), tiny_store, 8)

    def large(*args: Any) -> Any:  # as if a record took 4 MiB of pinned memory
        device, host = tiers_of(*args)
        return device, replace(host, slot_bytes=4 << 20)

    monkeypatch.setattr("fate_moe.engine.plan.tiers_of", large)
    with pytest.raises(BudgetError, match="ram: have 1.0 MiB") as error:
        on_device(compute="eager", ram="1MiB")
    ram = error.value.floor_bytes + (160 << 20)
    engine = on_device(compute="eager", experts="25%", window=8, ram=ram)
    host = engine.blueprint.host
    assert host is not None
    assert host.slots < 96
    assert isinstance(engine.reader, StagedReader)
    assert same(outcome(engine, tiny_store, 8), whole)
    assert engine.report().misses > 0 < engine.report().guesses
    assert "reads" in engine.mode
    report = engine.report()
    assert report.host_capacity == host.slots - 4
    assert report.host_hits is not None
    assert report.host_misses is not None
    assert report.host_hits > 0
    assert report.host_misses > report.host_capacity  # so some were evicted
    assert "pinned memory" in dict(report.rows())


def test_a_slow_link_changes_nothing(
    on_device: Open, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(on_device(policy="resident", compute="eager"), tiny_store, 8)
    slowed = partial(ThrottledReader, bytes_s=4e6)
    rates: list[float | None] = []
    while len(rates) < 3 and 4e6 not in rates:  # a machine that is busy with others seems slower
        engine = on_device(compute="eager", experts="40%", window=8, slowed=slowed)
        assert same(outcome(engine, tiny_store, 8), whole)
        report = engine.report()
        assert report.late > 0 < report.stall_s
        near = report.link_bytes_s == pytest.approx(4e6, rel=0.1)  # however seldom the host looks
        rates.append(4e6 if near else report.link_bytes_s)
        engine.close()
    assert 4e6 in rates
    monkeypatch.setattr("fate_moe.engine.device.PinnedRecords", None)  # not for this one
    few = MemoryPlan(2**30, replace(engine.blueprint.memory.demands, floor_slots=4), 10)
    monkeypatch.setattr(
        "fate_moe.engine.plan.make_plan", lambda *a: make_plan(*a) if len(a) > 3 else few
    )
    engine = on_device(compute="eager", experts="40%", window=8, slowed=slowed)
    assert same(outcome(engine, tiny_store, 8), whole)
    assert engine.report().stall_s > 0
    assert isinstance(engine.mover.filler._reader, ThrottledReader)


def test_what_answers_and_what_scores_runs_on_the_device(on_device: Open, tiny_store: Path) -> None:
    engine = on_device(compute="eager", experts="40%")
    conversation = Conversation(engine, load_tokenizer(tiny_store))
    first = conversation.ask("Fate", Sampling(max_new_tokens=4))
    again = conversation.ask("Fate streams", Sampling(max_new_tokens=4))
    assert first.new_tokens == again.new_tokens == 4
    likelihood = Likelihood(engine.model, engine.context_tokens)
    ids = list(range(3, 40))
    hidden = likelihood.hidden(ids)
    scores, _ = likelihood.of_tokens(hidden, ids, 1)
    assert scores.shape == (36,)
    assert bool((scores < 0).all())
    total, agreed = divergence(likelihood, hidden, hidden.cpu())  # as read from a reference
    assert (total, agreed) == (0.0, 37)
    with pytest.raises(ConfigError, match="maps are fitted on the processor"):
        calibrate(engine, torch.arange(3, 300))


def test_the_plan_holds_for_the_card(on_device: Open, card: Card) -> None:
    with pytest.raises(BudgetError, match=r"vram: have 1\.0 MiB, need at least .* try --vram") as e:
        on_device(vram="1MiB")
    engine = on_device(vram=e.value.floor_bytes + 4096)
    memory = engine.blueprint.memory
    assert isinstance(engine.mover.filler.slots, DeviceArena)
    assert engine.mover.filler.slots.memory.shape == (memory.slots, memory.demands.slot_bytes)
    report = engine.report()
    assert report.vram_peak_bytes is not None
    assert report.vram_planned_bytes is not None
    assert report.vram_peak_bytes <= report.vram_planned_bytes <= memory.budget_bytes
    engine.model(torch.arange(3, 259, device=engine.blueprint.device)[None])  # the whole context
    report = engine.report()
    assert report.vram_peak_bytes is not None
    assert report.vram_peak_bytes <= report.vram_planned_bytes
    assert "GPU memory" in dict(report.rows())
    with pytest.raises(BudgetError, match="larger --vram"):
        on_device(vram=e.value.floor_bytes + 4096, experts="100%")


def test_compute_paths_that_do_not_go_together(on_device: Open, tiny_store: Path) -> None:
    with pytest.raises(ConfigError, match="native computes on the processor; leave --vram out"):
        on_device(compute="native")
    with pytest.raises(ConfigError, match="triton computes on a GPU; name how much"):
        build(tiny_store, make_config(compute="triton"))


@pytest.mark.skipif(ON_CARD, reason="there is a card")
def test_without_a_card_one_line_says_so(tiny_store: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA card here"):
        build(tiny_store, make_config(vram="4GiB"))


def test_a_record_that_cannot_be_read_leaves_nothing_locked(
    on_device: Open, tiny_store: Path
) -> None:
    inner = FileReader(tiny_store, read_manifest(tiny_store))

    class Failing:
        mode = "buffered"

        def read_into(self, key: ExpertKey, buffer: memoryview) -> None:
            if key == (3, 5):
                raise ReadError(key, "a disk", 0, 5, "injected")
            inner.read_into(key, buffer)

        def close(self) -> None:
            inner.close()

    with pytest.raises(ReadError, match="injected"):
        build(tiny_store, make_config(vram="4GiB"), reader=Failing())  # type: ignore[arg-type]


def test_memory_that_cannot_be_locked_is_given_back() -> None:
    class Stingy(FakeCard):
        def pin(self, arena: Any) -> None:
            if len(self.pinned) == 2:
                raise ConfigError("no more")
            super().pin(arena)

    card = Stingy()
    with pytest.raises(ConfigError, match="no more"):
        PinnedRecords([2, 2, 2], [4096] * 3, card)
    assert not card.pinned
