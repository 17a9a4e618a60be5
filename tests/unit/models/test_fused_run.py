"""A token that goes through many layers in few native calls: same bits, and only where it may."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import DynamicCache

from fate_moe import native
from fate_moe.engine.prepare import convert_model
from fate_moe.engine.record import Recorder
from fate_moe.errors import ReadError
from fate_moe.models.fused_run import FusedRun, RunLayer, Untouched
from fate_moe.prefetch.mover import Mover
from fate_moe.types import Choice, ExpertKey, Phase, Prediction
from tests.tiny import LAYERS, TOP_K, save_checkpoint

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)

NEW, TOO_EARLY = 8, 2
"""Tokens answered; the first comes of the prompt, in the next one layers are still looked at."""


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tell of every token that went through in one call how many layers it passed."""
    passed: list[int] = []
    own = FusedRun.compute

    def compute(run: FusedRun, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        out = own(run, x, kwargs)
        if out is not None:
            passed.append(len(run.layers))
        return out

    monkeypatch.setattr(FusedRun, "compute", compute)
    return passed


def run_layers(model: nn.Module) -> list[RunLayer]:
    found = (getattr(one.__dict__.get("forward"), "__self__", None) for one in model.modules())
    return [one for one in found if isinstance(one, RunLayer)]


def answer(model: Any, mask: Tensor | None = None, length: int = 11, **more: Any) -> Any:
    ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(5))
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **more,
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    logits = zip(a.logits, b.logits, strict=True)
    return torch.equal(a.sequences, b.sequences) and all(torch.equal(x, y) for x, y in logits)


def one_by_one(model: Any, ask: Callable[[], Any]) -> Any:
    """Ask a model whose layers are computed one after the other."""
    layers = run_layers(model)
    runs = [layer._run for layer in layers]
    try:
        for layer in layers:
            layer._run = None
        return ask()
    finally:
        for layer, run in zip(layers, runs, strict=True):
            layer._run = run


@pytest.fixture
def model(open_engine: Any, tiny_store: Path) -> Any:
    return open_engine(tiny_store, policy="resident").model


def test_answers_have_the_bits_of_layers_one_by_one(model: Any, computed: list[int]) -> None:
    want = one_by_one(model, lambda: answer(model))
    assert not computed
    got = answer(model)
    assert computed == [LAYERS] * (NEW - TOO_EARLY)
    assert same(got, want)
    computed.clear()
    assert same(answer(model), want)
    assert computed == [LAYERS] * (NEW - 1)  # what all layers are called with has been seen


def test_what_leaves_the_last_layer_may_go_through_all_again(
    model: Any, computed: list[int]
) -> None:
    left: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: left.append(args[0]))
    answer(model)
    assert len(computed) == NEW - TOO_EARLY
    assert len(left) == NEW
    assert not any(hasattr(one, "_fate_run") for one in left)


def test_only_experts_that_are_awaited_are_computed(model: Any) -> None:
    answer(model)
    run = run_layers(model)[0]._run
    assert run is not None
    with pytest.raises(ValueError, match="no experts are needed"):
        run._native.compute([(0, 1, False)])


@pytest.mark.parametrize("wrong", ["twice", "nowhere", "another", "too many"])
def test_only_experts_that_were_chosen_are_computed(
    wrong: str, open_engine: Any, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_engine(tiny_store, policy="demand", experts="30%").model
    want = answer(model)

    def compute(run: FusedRun, experts: Any, arriving: Any) -> None:
        (expert, address, low), *rest = experts.places(next(iter(arriving)))
        chosen = sorted(e for row in run._ids.tolist() for e in row)
        unknown = next(e for e in range(10**6) if e not in chosen)
        run._native.compute({
            "twice": [(expert, address, low)] * 2,
            "nowhere": [(expert, 0, low)],
            "another": [(unknown, address, low)],
            "too many": [(expert, address, low), *rest, (unknown, address, low)],
        }[wrong])  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "_compute", compute)
        with pytest.raises(ValueError, match="no such expert is needed"):
            answer(model)
    assert same(answer(model), want)


def test_nothing_goes_on_before_all_experts_of_a_layer_are_computed(
    open_engine: Any, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_engine(tiny_store, policy="demand", experts="30%").model
    want = answer(model)
    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "_compute", lambda self, experts, arriving: list(arriving))
        with pytest.raises(ValueError, match="need all experts"):
            answer(model)
    assert same(answer(model), want)


def test_every_request_is_counted_as_a_hit(model: Any) -> None:
    model.fate.reset()
    answer(model)
    for layer in range(LAYERS):
        counts = model.fate.mover.telemetry.total(Phase.DECODE, layer)
        assert counts.requests == counts.hits == (NEW - 1) * TOP_K


def test_loading_counts_nothing(model: Any) -> None:
    assert model.fate.report().requests == 0


SOME = [("demand", "30%"), ("demand", "90%"), ("tuned", "50%"), ("path", "70%")]


def without_guesses(model: Any) -> Any:
    """Let a model guess nothing, as where it was found not to pay."""
    benefit = model.fate.mover.benefit
    benefit.level, benefit.end_step = 0, lambda seconds: None
    return model


@pytest.mark.parametrize(("policy", "experts"), SOME)
def test_where_experts_come_and_go_answers_have_the_same_bits(
    policy: str, experts: str, open_engine: Any, tiny_store: Path, computed: list[int]
) -> None:
    model = without_guesses(open_engine(tiny_store, policy=policy, experts=experts).model)
    want = one_by_one(model, lambda: answer(model))
    computed.clear()
    assert same(answer(model), want)
    assert same(answer(model), want)
    assert computed == [LAYERS] * (2 * NEW - TOO_EARLY - 1)
    assert model.fate.mover.telemetry.total(Phase.DECODE).misses > 0
    model.fate.mover.table.check()


@pytest.mark.parametrize("cache", ["arc", "lru", "transition"])
@pytest.mark.parametrize("experts", ["30%", "70%"])
def test_experts_come_and_go_as_they_do_layer_by_layer(
    cache: str, experts: str, open_engine: Any, tiny_store: Path
) -> None:
    def go(as_ever: bool) -> tuple[Any, Any]:
        model = open_engine(tiny_store, policy="demand", cache=cache, experts=experts).model
        for _ in range(2):  # of a longer prompt who stays depends on who lands first
            ask = partial(answer, model, length=1)
            one_by_one(model, ask) if as_ever else ask()
        mover = model.fate.mover
        return mover.telemetry.counts[Phase.DECODE], {e.key for e in mover.table.entries()}

    assert go(False) == go(True)


def test_light_experts_that_miss_are_computed_in_two_bits_as_layer_by_layer(
    open_engine: Any, tmp_path: Path, computed: list[int]
) -> None:
    # So wide that a head is fewer bytes than its record.
    checkpoint = save_checkpoint(tmp_path / "wide", moe_intermediate_size=128)
    convert_model(str(checkpoint), tmp_path / "store", cache_dir=tmp_path)

    def go(as_ever: bool) -> Any:
        lossy = {"policy": "demand", "experts": "50%", "int2_on_miss": 0.35}
        model = open_engine(tmp_path / "store", **lossy).model
        computed.clear()
        got = one_by_one(model, lambda: answer(model)) if as_ever else answer(model)
        assert model.fate.mover.telemetry.total(Phase.DECODE).low > 0
        return got

    want = go(True)
    assert not computed
    assert same(go(False), want)
    assert len(computed) == NEW - TOO_EARLY


def test_where_routers_prefer_what_is_in_memory_layers_are_no_run(
    open_engine: Any, tiny_store: Path
) -> None:
    biased = {"policy": "demand", "routing_bias": 1e6}
    assert not run_layers(open_engine(tiny_store, experts="50%", **biased).model)
    assert run_layers(open_engine(tiny_store, experts="100%", **biased).model)


def test_layers_that_miss_nothing_are_passed(
    open_engine: Any, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_engine(tiny_store, policy="demand", experts="70%").model
    answer(model)
    leases: list[int] = []
    own = model.fate.mover.lease

    def lease(choice: Choice) -> Any:
        leases.append(choice.layer)
        return own(choice)

    monkeypatch.setattr(model.fate.mover, "lease", lease)
    misses = model.fate.mover.telemetry.total(Phase.DECODE).misses
    answer(model)
    misses = model.fate.mover.telemetry.total(Phase.DECODE).misses - misses
    in_prefill = LAYERS
    assert 0 < len(leases) - in_prefill <= misses
    assert len(leases) - in_prefill < (NEW - 1) * LAYERS


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """Tell of every guess of a token."""
    guesses: list[Prediction] = []
    own = Mover.speculate

    def speculate(mover: Mover, guess: Prediction | None) -> None:
        if guess is not None and mover.turns.phase is Phase.DECODE:
            guesses.append(guess)
        own(mover, guess)

    monkeypatch.setattr(Mover, "speculate", speculate)
    return guesses


@pytest.mark.parametrize("policy", ["tuned", "fate", "path"])
def test_a_layer_that_guesses_stops_the_run(
    policy: str, open_engine: Any, tiny_store: Path, computed: list[int], guessed: list[Prediction]
) -> None:
    model = without_guesses(open_engine(tiny_store, policy=policy, experts="50%").model)
    answer(model)  # without guesses: the run knows by now where records lie
    model.fate.mover.benefit.level = 1
    computed.clear()
    want = one_by_one(model, lambda: answer(model))
    assert not computed
    before, guessed[:] = list(guessed), []
    model.fate.reset()
    assert same(answer(model), want)
    assert computed == [LAYERS] * (NEW - 1)
    first = 2 if policy == "path" else 1  # which needs to have seen two layers
    assert [guess.layer for guess in guessed] == [*range(first, LAYERS)] * (NEW - 1)
    if policy != "path":  # which remembers the answer before
        assert guessed == before
    counts = model.fate.mover.telemetry.total(Phase.DECODE)
    assert counts.requests == (NEW - 1) * TOP_K * LAYERS
    assert counts.recall is not None


def sharpened_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every layer ask what enters it for a second guess; tells which did."""
    sharpened = list[int]()
    for layer in model.fate.layers:
        own = layer.before_layer
        home = next(
            one.layer.module
            for one in run_layers(model)
            if one.feed_forward.moe.layer == layer.layer  # type: ignore[union-attr]
        )
        home.register_forward_pre_hook(lambda _, args, own=own: own(args[0]))
        monkeypatch.setattr(layer._predictor, "sharpen", lambda number, x: sharpened.append(number))
    for one in run_layers(model):  # the hooks are part of the model, as the engine's own are
        one._run._untouched = Untouched([one.layer.module])  # type: ignore[union-attr]
    return sharpened


def test_what_a_run_has_computed_is_guessed_no_more(
    open_engine: Any, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_guesses(open_engine(tiny_store, experts="50%").model)
    benefit, sharpened = model.fate.mover.benefit, sharpened_layers(model, monkeypatch)

    def rise(seconds: float) -> None:
        benefit.level = 2

    answer(model)
    sharpened.clear()
    benefit.levels, benefit.end_step = 3, rise
    answer(model)  # the level rises at the end of the first token, and stays
    assert sharpened == [*range(LAYERS)] * (NEW - 1)  # the prompt, and all tokens but the first


def test_of_a_run_that_guesses_once_the_first_layer_is_guessed_from_what_enters_it(
    open_engine: Any, tiny_store: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_guesses(open_engine(tiny_store, experts="50%").model)
    sharpened = sharpened_layers(model, monkeypatch)
    answer(model)
    model.fate.mover.benefit.level = 1
    sharpened.clear()
    computed.clear()
    got = answer(model)
    assert sharpened == [0] * NEW  # the prompt, too
    assert computed == [LAYERS] * (NEW - 1)
    sharpened.clear()
    assert same(got, one_by_one(model, lambda: answer(model)))
    assert sharpened == [0] * NEW


def test_without_guesses_no_layer_repeats_an_old_one(
    open_engine: Any, tiny_store: Path, computed: list[int], guessed: list[Prediction]
) -> None:
    model = without_guesses(open_engine(tiny_store, experts="50%").model)
    model.fate.mover.benefit.level = 1
    answer(model)
    model.fate.mover.benefit.level = 0
    computed.clear()
    guessed.clear()
    answer(model)
    assert computed == [LAYERS] * (NEW - 1)
    assert not guessed


def test_an_expert_that_cannot_be_read_costs_its_token_only(
    open_engine: Any, tiny_store: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_engine(tiny_store, policy="demand", experts="30%").model
    want = answer(model)
    own, calls = FusedRun._compute, []

    def broken(run: FusedRun, experts: Any, arriving: Any) -> None:
        calls.append(next(iter(arriving)))
        if len(calls) == 3:
            raise ReadError(ExpertKey(4, 1), "the store", 0, None, "gone")
        own(run, experts, [calls[-1], *arriving])

    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "_compute", broken)
        with pytest.raises(ReadError):
            answer(model)
    assert len(calls) == 3
    assert not computed
    assert same(answer(model), want)
    model.fate.mover.table.check()


def test_where_everything_is_in_memory_the_default_policy_guesses_nothing(
    open_engine: Any, tiny_store: Path, computed: list[int]
) -> None:
    model = open_engine(tiny_store, experts="100%").model
    want = one_by_one(model, lambda: answer(model))
    computed.clear()
    assert same(answer(model), want)
    assert computed == [LAYERS] * (NEW - TOO_EARLY)
    report = model.fate.report()
    assert report.guesses == report.misses == 0
    assert "not asked: every expert is in memory" in report.mode


def test_experts_computed_from_two_bits_go_one_by_one(open_engine: Any, tiny_store: Path) -> None:
    model = open_engine(tiny_store, policy="resident", int2="always").model
    assert not run_layers(model)


def test_a_window_asks_for_guesses_all_the_same(open_engine: Any, tiny_store: Path) -> None:
    model = open_engine(tiny_store, experts="100%", window=4).model
    answer(model)
    assert model.fate.report().recall


def test_a_run_goes_through_layers_without_experts(
    open_engine: Any, tmp_path: Path, computed: list[int]
) -> None:
    checkpoint = save_checkpoint(tmp_path / "mixed", mlp_only_layers=[0, 2])
    convert_model(str(checkpoint), tmp_path / "store", cache_dir=tmp_path)
    model = open_engine(tmp_path / "store", policy="resident").model
    want = one_by_one(model, lambda: answer(model))
    computed.clear()
    assert same(answer(model), want)
    assert computed == [LAYERS] * (NEW - TOO_EARLY)


@pytest.mark.parametrize(
    "part",
    [
        "layers.3", "layers.2.mlp", "layers.2.mlp.gate", "layers.1.mlp.experts",
        "layers.4.self_attn", "layers.4.self_attn.q_proj", "layers.5.post_attention_layernorm",
        "layers.0.mlp.shared_expert", "layers.0.mlp.shared_expert.up_proj",
    ],
)  # fmt: skip
def test_whoever_looks_at_a_part_sees_every_token(
    part: str, model: Any, computed: list[int]
) -> None:
    before = answer(model)
    computed.clear()
    seen: list[int] = []
    handle = model.model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    want = one_by_one(model, lambda: answer(model))
    assert same(answer(model), want)
    assert len(seen) == 2 * NEW
    assert not computed
    handle.remove()
    assert same(answer(model), before)
    assert computed


def test_hidden_states_are_those_of_each_layer(model: Any, computed: list[int]) -> None:
    answer(model)
    ask = lambda: answer(model, output_hidden_states=True)  # noqa: E731
    computed.clear()
    got, want = ask(), one_by_one(model, ask)
    assert not computed
    for a, b in zip(got.hidden_states[-1], want.hidden_states[-1], strict=True):
        assert torch.equal(a, b)
    assert len({float(state.sum()) for state in got.hidden_states[-1]}) > LAYERS


def test_another_forward_in_a_layers_place_is_called(model: Any, computed: list[int]) -> None:
    answer(model)
    computed.clear()
    layer, calls = model.model.layers[3], []
    ours = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    layer.forward = wrapped
    answer(model)
    assert len(calls) == NEW
    assert not computed


def test_tokens_that_a_mask_hides_stay_hidden(model: Any, computed: list[int]) -> None:
    answer(model)
    computed.clear()
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, :4] = 0
    want = one_by_one(model, lambda: answer(model, mask))
    assert same(answer(model, mask), want)
    assert not computed


@torch.no_grad()
def write(model: Any, cache: Any, count: int = 6) -> list[Tensor]:
    """Read a prompt into a cache, write tokens that are given, return their logits."""
    draw = torch.Generator().manual_seed(6)
    model(input_ids=torch.randint(3, 250, (1, 11), generator=draw), past_key_values=cache)
    ids = torch.randint(3, 250, (count, 1, 1), generator=draw)
    return [model(input_ids=one, past_key_values=cache).logits for one in ids]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_a_model_that_is_told_to_leave_its_last_layers_out_does(
    model: Any, computed: list[int]
) -> None:
    answer(model)
    config = model.config.get_text_config()
    cache, depth = DynamicCache(config=config), config.num_hidden_layers
    write(model, cache)
    computed.clear()
    config.num_hidden_layers = 2
    token = torch.tensor([[7]])
    model(input_ids=token, past_key_values=cache)
    assert not computed
    assert [layer.get_seq_length() for layer in cache.layers] == [18] * 2 + [17] * 4
    config.num_hidden_layers = depth


@torch.no_grad()
@pytest.mark.parametrize("change", ["wrapped", "swapped"])
def test_another_list_of_layers_is_gone_through(
    change: str, model: Any, computed: list[int]
) -> None:
    answer(model)
    computed.clear()
    layers = model.model.layers

    class Louder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return 2 * self.inner(x, **kwargs)  # type: ignore[no-any-return]

    if change == "wrapped":
        layers[2] = Louder(layers[2])
    else:
        layers[1], layers[4] = layers[4], layers[1]
    got = write(model, DynamicCache(config=model.config))
    want = one_by_one(model, lambda: write(model, DynamicCache(config=model.config)))
    assert equal(got, want)
    assert not computed


@torch.no_grad()
def test_a_layer_that_is_called_alone_computes_itself(model: Any, computed: list[int]) -> None:
    answer(model)
    cache = DynamicCache(config=model.config)
    write(model, cache)
    computed.clear()
    hidden, body = torch.randn(1, 1, 64), model.model
    turn = body.rotary_emb(hidden, torch.tensor([[17]]))
    call = {"position_embeddings": turn, "attention_mask": None, "past_key_values": cache}
    body.layers[0](hidden, **call)
    assert not computed
    assert [layer.get_seq_length() for layer in cache.layers] == [18] + [17] * 5


def test_layers_of_another_type_have_masks_of_their_own(
    open_engine: Any, tmp_path: Path, computed: list[int]
) -> None:
    types = ["full_attention", *["sliding_attention"] * 5]
    slides = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    convert_model(
        str(save_checkpoint(tmp_path / "slides", **slides)), tmp_path / "store", cache_dir=tmp_path
    )
    model = open_engine(tmp_path / "store", policy="resident").model
    # A cache that does not know of the window keeps all; masks then hide what is too old.
    want = one_by_one(model, lambda: write(model, DynamicCache(), 20))
    assert equal(write(model, DynamicCache(), 20), want)
    computed.clear()
    want = one_by_one(model, lambda: write(model, DynamicCache(config=model.config), 20))
    assert equal(write(model, DynamicCache(config=model.config), 20), want)
    assert set(computed) == {5}


def test_experts_that_somebody_replaced_are_asked(model: Any, computed: list[int]) -> None:
    answer(model)
    computed.clear()
    experts, calls = model.model.layers[3].mlp.experts, []
    ours = experts.attached

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return ours(*args, **kwargs)  # type: ignore[no-any-return]

    experts.attached = theirs
    answer(model)
    assert len(calls) == NEW
    assert not computed


def test_a_hook_on_all_modules_sees_them(model: Any, computed: list[int]) -> None:
    answer(model)
    computed.clear()
    seen: list[nn.Module] = []
    handle = module_hooks.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        answer(model)
    finally:
        handle.remove()
    assert not computed
    assert all(seen.count(layer) == NEW for layer in model.model.layers)


@pytest.mark.parametrize(("policy", "experts"), [("resident", None), ("demand", "50%")])
def test_threads_compute_one_after_the_other(
    policy: str, experts: str | None, open_engine: Any, tiny_store: Path, computed: list[int]
) -> None:
    model = open_engine(tiny_store, policy=policy, experts=experts).model
    want = answer(model)
    computed.clear()
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda _: answer(model), range(3)))
    assert all(same(one, want) for one in got)
    assert computed
    model.fate.mover.table.check()


def test_a_trace_misses_nothing(model: Any, computed: list[int]) -> None:
    answer(model)
    computed.clear()
    with Recorder(model.fate) as recorder:
        answer(model)
    assert not computed
    assert len(recorder.trace.steps) == NEW
    assert all(len(step.choices) == LAYERS for step in recorder.trace.steps)


def test_after_an_interrupt_experts_are_read_again(model: Any, computed: list[int]) -> None:
    want = answer(model)
    computed.clear()
    mover = model.fate.mover
    mover.section.torn = True  # as an interrupt in a critical section leaves it
    assert same(answer(model), want)
    assert computed == [LAYERS] * (NEW - 1)
    assert mover.telemetry.total().misses > 0
    mover.table.check()


def test_an_error_in_the_run_lets_the_next_token_compute(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = answer(model)
    run = run_layers(model)[0]._run
    assert run is not None
    own = run._native

    class Broken:
        def begin(self, *args: object) -> None:
            raise MemoryError("no memory")

    monkeypatch.setattr(run, "_native", Broken())
    with pytest.raises(MemoryError, match="no memory"):
        answer(model)
    monkeypatch.setattr(run, "_native", own)
    assert same(answer(model), want)


@pytest.mark.parametrize("between", [None, 3])
def test_something_done_between_layers_is_seen(between: int | None, model: Any) -> None:
    run = run_layers(model)[0]._run
    assert run is not None
    for number in range(LAYERS):
        was_handed_on = number not in (0, between)
        x = run.handed_on if was_handed_on and run.handed_on is not None else torch.zeros(1)
        run.see(number, x, {"use_cache": True})
        run.handed_on = torch.ones(1)
    assert run.is_alike == (between is None)
