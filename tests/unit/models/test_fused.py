"""Fused forwards compute what the family's own do, on the same cache, or are not taken."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from fate_moe import native
from fate_moe.models.cache_growing import GrowingLayer, GrowingSlidingLayer
from fate_moe.models.fused import fuse, unfuse
from fate_moe.models.fused_attention import fuse_attention
from fate_moe.models.fused_block import fuse_block
from fate_moe.models.fused_layer import fuse_layer
from fate_moe.models.fused_parts import FusedDense, fuse_part
from fate_moe.models.fused_step import Positions
from fate_moe.models.seam import experts_left_out, find_experts
from tests.families.tiny_config import tiny_config
from tests.unit.models.test_quantized import make_linear

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)

LAYERS, NEW = 4, 40
BOUND = 1e-4  # of the largest logit
WINDOW = 8  # of tests.families.tiny_config


def make_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(5)
            elif "bias" in name or "sinks" in name:
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def tokens(count: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 200, (batch, count), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def decode(model: Any, ids: Tensor, cache: Any | None = None, new: int = NEW) -> list[Tensor]:
    """Feed a prompt, then fixed tokens one by one; return each step's logits."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    steps = [ids, *torch.split(tokens(new, len(ids)), 1, dim=1)]
    return [
        model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1] for step in steps
    ]


def furthest(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def run_both(model: Any, prompt: int = 5) -> tuple[dict[str, int], float]:
    want = decode(model, tokens(prompt))
    counts = fuse(model, 512)
    return counts, furthest(decode(model, tokens(prompt)), want)


def own_way(model: Any, act: Callable[[], Any]) -> int:
    """Count how many layers a step takes in the family's own way."""
    taken = 0
    for layer in model.model.layers:
        fused = layer.forward.__self__
        own = fused.own

        def count(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            nonlocal taken
            taken += 1
            return own(*args, **kwargs)

        fused.own = count
    act()
    for layer in model.model.layers:
        layer.forward.__self__.own = layer.forward.__self__.own.__kwdefaults__["own"]
    return taken


def one_more(model: Any, batch: int = 1, **given: Any) -> Callable[[], Any]:
    """Prepare a step of one token after five."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(5, batch), past_key_values=cache, use_cache=True)

    def act() -> Any:
        return model(input_ids=tokens(1, batch), past_key_values=cache, use_cache=True, **given)

    return act


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen2_moe", {"layer", "router", "dense"}),
        ("qwen3_moe", {"layer", "router"}),
        ("mixtral", {"layer", "router"}),
        ("olmoe", {"layer", "router"}),
        ("granitemoe", {"layer", "router"}),
        ("glm4_moe", {"layer", "dense"}),
    ],
)
def test_fused_logits_are_the_familys_own(family: str, kinds: set[str]) -> None:
    model = make_model(family)
    counts, apart = run_both(model)
    assert {kind for kind in counts if kind in ("layer", "router", "dense")} == kinds
    assert counts["layer"] == counts["attention"] == LAYERS
    assert 0 < apart < BOUND
    with torch.no_grad():
        assert own_way(model, one_more(model)) == 0


def offloaded(family: str) -> tuple[Any, list[bool]]:
    """Make a model whose experts are a formula; and whether each was handed something beside."""
    skeleton = make_model(family)
    with experts_left_out(skeleton):
        model = make_model(family)
    given = []

    def experts(x: Tensor, ids: Tensor, weights: Tensor, beside: Any = None) -> Tensor:
        given.append(beside is not None)
        if beside is not None:
            beside()
        return (x.flip(1) + ids.float().mean(1, keepdim=True)) * weights.sum(1, keepdim=True)

    for module in find_experts(model).values():
        module.attached = experts  # type: ignore[assignment]
    return model, given


@pytest.mark.parametrize(
    ("family", "beside"), [("qwen2_moe", True), ("qwen3_moe", False), ("olmoe", False)]
)
def test_blocks_whose_experts_are_elsewhere_are_fused(family: str, beside: bool) -> None:
    model, given = offloaded(family)
    want = decode(model, tokens(5))
    assert fuse(model, 512)["block"] == LAYERS
    given.clear()
    apart = furthest(decode(model, tokens(5)), want)
    assert apart < BOUND
    assert given == LAYERS * [False] + NEW * LAYERS * [beside]  # the prompt goes the family's way
    unfuse(model)
    assert furthest(decode(model, tokens(5)), want) == 0


def test_a_block_that_is_watched_goes_the_familys_way() -> None:
    model, given = offloaded("qwen2_moe")
    fuse(model, 512)
    block = model.model.layers[0].mlp
    seen = []
    block.shared_expert.register_forward_hook(lambda *_: seen.append(1))
    act = one_more(model)
    seen.clear(), given.clear()
    with torch.no_grad():
        act()
    assert seen == [1]
    assert given == [False] + (LAYERS - 1) * [True]


def test_a_block_of_another_formula_is_left_alone() -> None:
    model, _ = offloaded("qwen2_moe")
    block = model.model.layers[0].mlp
    assert fuse_block(block) is not None
    own = block.forward
    block.forward = lambda x: 1.01 * own(x)
    assert fuse_block(block) is None


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "llama4_text"])
def test_what_attends_otherwise_is_left_alone(family: str) -> None:
    model = make_model(family)
    counts, apart = run_both(model)
    assert not {"layer", "attention"} & counts.keys()
    assert counts["norm"] > 0
    assert apart < BOUND


def test_a_family_that_multiplies_residuals() -> None:
    model = make_model("granitemoe")
    for layer in model.model.layers:
        layer.residual_multiplier = 0.3
        layer.self_attn.scaling = 0.1
    counts, apart = run_both(model)
    assert counts["layer"] == LAYERS
    assert 0 < apart < BOUND


@pytest.mark.parametrize("prompt", [3, WINDOW - 1, WINDOW, 20])
def test_a_window_slides(prompt: int) -> None:
    model = make_model(
        "qwen2_moe",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    )
    want = decode(model, tokens(prompt))
    fuse(model, 512)
    cache = DynamicCache(config=model.config)
    assert furthest(decode(model, tokens(prompt), cache), want) < BOUND
    assert [type(layer) for layer in cache.layers[:2]] == [GrowingSlidingLayer, GrowingLayer]
    assert cache.layers[0].keys.shape[-2] == WINDOW - 1
    assert cache.layers[1].keys.shape[-2] == prompt + NEW


def test_part_of_a_head_is_turned() -> None:
    model = make_model("glm4_moe")
    assert fuse(model, 512)["layer"] == LAYERS
    forward = model.model.layers[0].self_attn.forward
    assert forward.__self__.rotary < forward.__self__.dim


def test_a_cache_serves_several_turns() -> None:
    model = make_model("qwen3_moe")

    def talk() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        out = decode(model, tokens(5), cache, 7)
        cache.crop(-4)
        out += decode(model, tokens(9), cache, 7)
        cache.reorder_cache(torch.tensor([0]))
        return out + decode(model, tokens(1), cache, 7)

    want = talk()
    fuse(model, 16)  # fewer tokens than there will be: caches grow nevertheless
    assert furthest(talk(), want) < BOUND


def test_generate_gives_the_same_tokens() -> None:
    model = make_model("qwen2_moe")
    model.generation_config.eos_token_id = None
    ids = tokens(6)
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    want = model.generate(input_ids=ids, **ask)
    fuse(model, 512)
    assert torch.equal(model.generate(input_ids=ids, **ask), want)
    unfuse(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_several_threads_and_a_long_history() -> None:
    core = native.core()
    model = make_model("qwen2_moe", max_position_embeddings=4096)
    want = decode(model, tokens(1500), new=3)
    fuse(model, 4096)
    threads = core.threads()
    try:
        for count in (1, 2):
            core.set_threads(count)
            assert furthest(decode(model, tokens(1500), new=3), want) < BOUND
    finally:
        core.set_threads(threads)


@pytest.mark.parametrize("isa", native.core().isas() if native.is_available() else [])
def test_every_instruction_set(isa: str) -> None:
    core = native.core()
    before = core.isa()
    model = make_model("qwen3_moe")
    want = decode(model, tokens(70), new=3)
    try:
        core.use_isa(isa)
        fuse(model, 512)
        assert furthest(decode(model, tokens(70), new=3), want) < BOUND
    finally:
        core.use_isa(before)


def test_only_one_token_of_one_sequence_is_fused() -> None:
    model = make_model("qwen2_moe")
    masked = torch.tensor([[1, 1, 0, 1, 1, 1]])

    steps = {
        "batch": one_more(model, 2),
        "masked": one_more(model, attention_mask=masked),
    }
    with torch.no_grad():
        want = {name: act().logits for name, act in steps.items()}
    fuse(model, 512)
    with torch.no_grad():
        assert own_way(model, one_more(model)) == 0
        assert own_way(model, one_more(model, attention_mask=torch.ones(1, 6))) == 0
        assert own_way(model, one_more(model, 2)) == LAYERS
        assert own_way(model, one_more(model, attention_mask=masked)) == LAYERS
        again = {"batch": one_more(model, 2), "masked": one_more(model, attention_mask=masked)}
        for name, act in again.items():
            assert torch.allclose(act().logits, want[name], atol=1e-5)
    assert own_way(model, one_more(model)) == LAYERS  # with gradients
    with torch.no_grad():
        assert own_way(model, one_more(model, output_attentions=True)) == LAYERS
    model.train()
    with torch.no_grad():
        assert own_way(model, one_more(model)) == LAYERS


def test_a_batch_goes_its_own_way() -> None:
    model = make_model("qwen2_moe")
    ids = tokens(5, 2)
    want = decode(model, ids)
    fuse(model, 512)
    assert furthest(decode(model, ids), want) < BOUND


def test_hooks_and_new_modules_are_respected() -> None:
    model = make_model("qwen2_moe")
    fuse(model, 512)
    layer = model.model.layers[1]
    calls: list[str] = []
    handle = layer.self_attn.register_forward_hook(lambda *args: calls.append("attention"))
    decode(model, tokens(3), new=2)
    assert len(calls) == 3
    handle.remove()
    before = decode(model, tokens(3), new=2)
    projection = layer.self_attn.q_proj
    layer.self_attn.q_proj = nn.Linear(projection.in_features, projection.out_features)
    assert furthest(decode(model, tokens(3), new=2), before) > 10 * BOUND


def test_attentions_and_router_logits_can_be_asked_for() -> None:
    model = make_model("qwen2_moe")
    cache = DynamicCache(config=model.config)
    fuse(model, 512)
    with torch.no_grad():
        model(input_ids=tokens(4), past_key_values=cache, use_cache=True)
        out = model(
            input_ids=tokens(1), past_key_values=cache, use_cache=True, output_router_logits=True,
            output_hidden_states=True,
        )  # fmt: skip
    assert len(out.router_logits) == LAYERS
    assert len(out.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("bits", [4, 8])
def test_records_are_fused_with_their_attention(bits: int) -> None:
    model = make_model("qwen2_moe")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            new = make_linear(old.out_features, old.in_features, bits, bias=old.bias is not None)
            setattr(layer.self_attn, name, new)
        shared = layer.mlp.shared_expert
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(shared, name)
            setattr(shared, name, make_linear(old.out_features, old.in_features, bits))
    counts, apart = run_both(model)
    assert counts["layer"] == counts["dense"] == LAYERS
    assert apart < 3e-2  # a last bit may move an activation's code


class Dense(nn.Module):
    """A gated feed-forward of records."""

    def __init__(self, width: int, inner: int, bits: int, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj = make_linear(inner, width, bits, bias=True)
        self.up_proj = make_linear(inner, width, bits)
        self.down_proj = make_linear(width, inner, bits)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [2, 17])
def test_many_tokens_of_records_in_one_call(bits: int, tokens: int) -> None:
    torch.manual_seed(bits)
    module = Dense(96, 160, bits, nn.SiLU())
    kind, fused = fuse_part(module)  # type: ignore[misc]
    assert kind == "dense"
    x = torch.randn(1, tokens, 96)
    got = fused.forward(x)
    assert not torch.equal(got, torch.zeros_like(got))
    assert fused._x.numel() == 0  # type: ignore[attr-defined]
    want = module(x)
    assert float((got - want).norm() / want.norm()) < 3e-3
    share = torch.randn(96)
    scaled = FusedDense(module, share)
    assert scaled.takes(x)
    part = got * torch.sigmoid(x @ share)[..., None]
    assert float((scaled.forward(x) - part).norm() / part.norm()) < 1e-5
    module.up_proj.register_forward_hook(lambda *_: None)  # is looked at: the family's own way
    assert torch.equal(fused.forward(x), want)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_one_token_of_a_large_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(257, 300, bias=bias)
    kind, fused = fuse_part(module)  # type: ignore[misc]
    assert kind == "linear"
    x, several = torch.randn(1, 1, 257), torch.randn(1, 3, 257)
    exact = x.double() @ module.weight.double().T + (0 if module.bias is None else module.bias)
    got = fused.forward(x)
    assert got.shape == (1, 1, 300)
    assert float((got - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(fused.forward(several), module(several))
    assert torch.equal(fused.forward(x.transpose(0, 1)), got)  # the same bits each time


def test_small_and_other_linear_layers_are_left_alone() -> None:
    assert fuse_part(nn.Linear(8, 8)) is None
    assert fuse_part(nn.Linear(300, 300, dtype=torch.bfloat16)) is None


def test_the_vocabulary_is_computed_natively() -> None:
    model = make_model("qwen2_moe", vocab_size=4096)
    counts, apart = run_both(model)
    assert counts["linear"] >= 1
    assert model.lm_head.forward.__self__.__class__.__name__ == "FusedLinear"
    assert 0 < apart < BOUND
    unfuse(model)
    assert "forward" not in model.lm_head.__dict__


class Wrong:
    """Ways in which attention could differ from what it looks like."""

    @staticmethod
    def scaled_by_position(attention: Any) -> None:
        own = attention.forward

        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            out, weights = own(hidden_states, **kwargs)
            return out * (1 + (kwargs["position_ids"] > 10_000).float()), weights

        attention.forward = forward

    @staticmethod
    def clipped(attention: Any) -> None:
        own = attention.v_proj.forward
        attention.register_forward_pre_hook(lambda *args: None)

        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            given = attention.v_proj.__dict__["forward"]
            attention.v_proj.forward = lambda x: given(x).clamp(-8, 8)
            try:
                return type(attention).forward(attention, hidden_states, **kwargs)
            finally:
                attention.v_proj.forward = given

        attention.v_proj.forward = own
        attention.forward = forward

    @staticmethod
    def scale(attention: Any) -> None:
        own = attention.forward

        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            said, attention.scaling = attention.scaling, 1.01 * attention.scaling
            try:
                return own(hidden_states, **kwargs)
            finally:
                attention.scaling = said

        attention.forward = forward


@pytest.mark.parametrize("way", ["scaled_by_position", "clipped", "scale"])
def test_a_trial_refuses_attention_that_differs(way: str) -> None:
    attention = make_model("qwen2_moe").model.layers[0].self_attn
    assert fuse_attention(attention, [16], 512, Positions()) is not None
    getattr(Wrong, way)(attention)
    assert fuse_attention(attention, [16], 512, Positions()) is None


def test_a_trial_refuses_a_layer_that_differs() -> None:
    layer = make_model("qwen2_moe").model.layers[0]
    attention = fuse_attention(layer.self_attn, [16], 512, Positions())
    assert attention is not None
    assert fuse_layer(layer, attention) is not None
    own = layer.forward
    layer.forward = lambda *args, **kwargs: 1.001 * own(*args, **kwargs)
    assert fuse_layer(layer, attention) is None


def test_a_trial_refuses_parts_that_differ() -> None:
    model = make_model("qwen2_moe")
    mlp = model.model.layers[0].mlp
    parts = {"router": mlp.gate, "dense": mlp.shared_expert, "norm": model.model.norm}
    for kind, module in parts.items():
        part = fuse_part(module)
        assert part is not None
        assert part[0] == kind
        own = module.forward

        def forward(x: Tensor, own: Any = own) -> Any:
            out = own(x)
            return (out[0], 1.001 * out[1], out[2]) if isinstance(out, tuple) else 1.001 * out

        module.forward = forward
        assert fuse_part(module) is None


def test_what_was_fused_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fate_moe.models.fused"):
        counts = fuse(make_model("qwen2_moe"), 512)
    assert str(counts) in caplog.text


def test_modules_of_another_dtype_are_left_alone() -> None:
    model = make_model("qwen2_moe").bfloat16()
    assert fuse(model, 512) == {}


def test_a_norm_with_a_gate_keeps_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            x = x if gate is None else x * gate
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    norm = Gated()
    part = fuse_part(norm)
    assert part is not None
    x, gate = torch.rand(1, 64), torch.rand(1, 64)
    with torch.no_grad():
        assert torch.equal(part[1].forward(x, gate), norm(x, gate))
        assert torch.allclose(part[1].forward(x), norm(x), atol=1e-6)


def test_no_record_is_unpacked_to_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a record was unpacked")

    model = nn.ModuleDict({"linear": make_linear(64, 64, 4)})
    monkeypatch.setattr(type(model["linear"]), "weight", property(refuse))
    assert fuse(model, 512) == {}


@pytest.mark.parametrize("compute", ["eager", "native"])
def test_an_engine_fuses_only_where_it_computes_natively(
    compute: str, open_engine: Any, tiny_store: Any
) -> None:
    engine = open_engine(tiny_store, compute=compute)
    fused = [module for module in engine.model.modules() if "forward" in module.__dict__]
    assert bool(fused) == (compute == "native")


def test_smolmoe_answers_as_unfused(open_engine: Any, smolmoe_store: Any) -> None:
    model = open_engine(smolmoe_store, compute="native").model
    ids = tokens(12)
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    fused = model.generate(input_ids=ids, **ask)
    layers = sum("forward" in layer.__dict__ for layer in model.model.layers)
    assert layers == len(model.model.layers)
    unfuse(model)
    assert torch.equal(model.generate(input_ids=ids, **ask), fused)
