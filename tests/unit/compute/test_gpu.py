"""The GPU's kernels against the definition, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from fate_moe.compute.eager import EagerExperts
from fate_moe.compute.gpu import GpuExperts, can_compute
from fate_moe.compute.native import GateForm
from fate_moe.models.gate_form import apply_gate
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What one rounding may lose; the interpreter cuts bfloat16 off where a card rounds it.
UNIT = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SILU = GateForm("SILU")
FORMS = [
    SILU,
    GateForm("GELU"),
    GateForm("GELU_TANH", interleaved=True),
    GateForm("RELU", gated=False),
    GateForm("RELU2", gated=False),
    GateForm("SILU", interleaved=True, alpha=1.702, limit=0.7, offset=1.0),
    GateForm("SILU", limit=0.2, limit_after=True),
]


def layout_of(hidden: int, inner: int, form: GateForm, group: int, bias: bool) -> RecordLayout:
    up = "gate_up_proj" if form.gated else "up_proj"
    rows = 2 * inner if form.gated else inner
    return RecordLayout(
        (MatrixSpec(up, rows, hidden, group), MatrixSpec("down_proj", hidden, inner, 32)),
        (BiasSpec(f"{up}_bias", rows), BiasSpec("down_proj_bias", hidden)) if bias else (),
    )


class Both:
    """The same experts by both paths; slots are longer than records and in another order."""

    def __init__(self, layout: RecordLayout, form: GateForm, experts: int):
        self.form = form
        slots = torch.zeros(experts, layout.record_bytes + 4096, dtype=torch.uint8)
        self.slot_of = list(reversed(range(experts)))
        for expert, slot in enumerate(self.slot_of):
            slots[slot, : layout.record_bytes] = record(layout, expert)
        up = "gate_up_proj" if form.gated else "up_proj"

        def math(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            inner = apply_gate(form, x @ weights[up].T + weights.get(f"{up}_bias", 0))
            return inner @ weights["down_proj"].T + weights.get("down_proj_bias", 0)

        # The slots' weights in float64: what is left is the kernels' own rounding.
        self.exact = EagerExperts(
            lambda bytes_, dtype: decode(layout, bytes_, dtype),
            math,  # type: ignore[arg-type]
            lambda slot: slots[slot],
            lambda bytes_, dtype: decode_int2(layout, bytes_, dtype),
        )
        self.gpu = GpuExperts(layout, form, slots.to(DEVICE))

    def arriving(self, ids: Tensor, low: frozenset[int]) -> list[tuple[int, int, bool]]:
        return [(e, self.slot_of[e], e in low) for e in ids.unique().tolist()]


def record(layout: RecordLayout, seed: int) -> Tensor:
    torch.manual_seed(seed)
    tensors = {m.name: torch.randn(m.rows, m.cols) / m.cols**0.5 for m in layout.matrices}
    tensors |= {b.name: torch.randn(b.size) / 4 for b in layout.biases}
    return encode(layout, tensors, fitted=False)


def routing(tokens: int, experts: int, k: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    weights, ids = torch.rand(tokens, experts).topk(k)
    return torch.randn(tokens, hidden), ids, weights


def run(both: Both, x: Tensor, ids: Tensor, weights: Tensor, arriving: list) -> Tensor:  # type: ignore[type-arg]
    return both.gpu(x.to(DEVICE), ids, weights.to(DEVICE, x.dtype), arriving).cpu()


def check(
    both: Both, hidden: int, tokens: int, experts: int, k: int,
    low: frozenset[int] = frozenset(), dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    x, ids, weights = routing(tokens, experts, k, hidden)
    x, weights = x.to(dtype), weights.to(dtype)
    arriving = both.arriving(ids, low)
    have = run(both, x, ids, weights, [arriving])
    assert have.dtype is dtype
    want = both.exact(x.double(), ids, weights.double(), [arriving])
    # One for each matrix that a path through an expert meets, and a gate's product meets two before
    # the last; one for what is between them, and one for each of the parts of a sum.
    matrices = 3 if both.form.gated else 2
    lost = float((have.double() - want).norm() / want.norm())
    assert lost < (matrices + 1 + k) * UNIT[dtype]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.act}-{form.gated}-{form.limit}")
@pytest.mark.parametrize("tokens", [1, 12])
def test_every_form_is_computed(form: GateForm, tokens: int) -> None:
    both = Both(layout_of(96, 64, form, 32, bias=True), form, 6)
    check(both, 96, tokens, 6, 3, frozenset({1, 4}))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([32, 64, 96, 160]), st.sampled_from([32, 96]), st.sampled_from([1, 3, 9, 40]),
    st.integers(1, 8), st.sets(st.integers(0, 7)), st.sampled_from(list(UNIT)), st.data(),
)  # fmt: skip
def test_any_shape_precision_and_empty_experts(
    hidden: int, inner: int, tokens: int, experts: int, low: set[int], dtype: torch.dtype,
    data: st.DataObject,
) -> None:  # fmt: skip
    group = data.draw(st.sampled_from([64, 32] if hidden % 64 == 0 else [32]))
    k = data.draw(st.integers(1, experts))
    both = Both(layout_of(hidden, inner, SILU, group, bias=False), SILU, experts)
    check(both, hidden, tokens, experts, k, frozenset(low), dtype)


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_the_order_of_arrival_does_not_show(tokens: int) -> None:
    both = Both(layout_of(64, 32, SILU, 64, bias=True), SILU, 5)
    x, ids, weights = routing(tokens, 5, 3, 64)
    arriving = both.arriving(ids, frozenset({2}))
    together = run(both, x, ids, weights, [arriving])
    one_by_one = run(both, x, ids, weights, [[one] for one in reversed(arriving)])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_choice_of_no_expert_adds_nothing(tokens: int) -> None:
    both = Both(layout_of(64, 32, SILU, 64, bias=True), SILU, 4)
    x, ids, weights = routing(tokens, 4, 2, 64)
    run(both, x, ids, weights, [both.arriving(ids, frozenset())])  # what it leaves must not count
    one = run(both, x, ids[:, :1], weights[:, :1], [both.arriving(ids[:, :1], frozenset())])
    ids[:, 1] = 4
    two = run(both, x, ids, weights, [both.arriving(ids[:, :1], frozenset())])
    assert torch.equal(one, two)


def test_a_low_expert_reads_its_head_alone() -> None:
    layout = layout_of(64, 32, SILU, 64, bias=False)
    both = Both(layout, SILU, 2)
    x, ids, weights = routing(4, 2, 1, 64)
    arriving = both.arriving(ids, frozenset({0, 1}))
    whole = run(both, x, ids, weights, [arriving])
    both.gpu._slots[:, layout.head_bytes :] = 255
    assert torch.equal(run(both, x, ids, weights, [arriving]), whole)


def test_only_records_of_two_planes_are_read() -> None:
    assert can_compute(layout_of(64, 32, SILU, 64, bias=False))
    eight = RecordLayout((MatrixSpec("up_proj", 32, 64, 64),), bits=8)
    assert not can_compute(eight)


def test_token_after_token() -> None:
    both = Both(layout_of(64, 32, SILU, 64, bias=True), SILU, 6)
    x, ids, weights = routing(5, 6, 3, 64)
    low = frozenset({1, 4})
    found = []
    for t in range(5):
        arriving = both.arriving(ids[t : t + 1], low if t % 2 else frozenset())
        pieces = [arriving[1:], arriving[:1]] if t > 2 else [arriving]
        found.append(
            (run(both, x[t : t + 1], ids[t : t + 1], weights[t : t + 1], pieces), arriving)
        )
    for t, (have, arriving) in enumerate(found):  # an answer outlives the next token
        want = both.exact(
            x[t : t + 1].double(), ids[t : t + 1], weights[t : t + 1].double(), [arriving]
        )
        assert float((have.double() - want).norm() / want.norm()) < 6 * UNIT[torch.float32]
