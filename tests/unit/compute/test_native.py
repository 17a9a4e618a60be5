"""The native core against the reference: same records, same routing, every shape and form."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fate_moe.compute import EagerExperts, GateForm, NativeExperts
from fate_moe.compute.native import matrix_place
from fate_moe.models.gate_form import apply_gate
from fate_moe.native import core
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout

# Rounding to eight bits moves a normal activation by 0.6 % of its norm; two roundings, the larger
# peaks of what lies between the matrices, and the gate times up make up to 2 %.
BOUND = 0.02
# Against torch with the same two roundings: what is left is float32's own error, and now and then a
# value between two codes that goes to the other one.
SAME_ROUNDING = 2e-3

PLAIN = GateForm("SILU")
FORMS = [
    PLAIN,
    GateForm("GELU"),
    GateForm("GELU_TANH"),
    GateForm("RELU"),
    GateForm("RELU2", gated=False),
    GateForm("SILU", interleaved=True, alpha=1.702, limit=0.7, offset=1.0),
    GateForm("SILU", limit=0.5),
    GateForm("SILU", limit=0.3, limit_after=True),
]


@pytest.fixture(params=core().isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on every instruction set this machine has, the portable one among them."""
    before = core().isa()
    core().use_isa(request.param)
    yield request.param
    core().use_isa(before)


def layout_of(
    hidden: int, inner: int, bits: int = 4, *, gated: bool = True, biased: bool = False
) -> RecordLayout:
    def group(cols: int) -> int:
        return 64 if cols % 64 == 0 else 32

    up = "gate_up_proj" if gated else "up_proj"
    rows = 2 * inner if gated else inner
    biases = (BiasSpec(f"{up}_bias", rows), BiasSpec("down_proj_bias", hidden)) if biased else ()
    return RecordLayout(
        (
            MatrixSpec(up, rows, hidden, group(hidden)),
            MatrixSpec("down_proj", hidden, inner, group(inner)),
        ),
        biases,
        bits,
    )


def records(layout: RecordLayout, count: int) -> list[Tensor]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        tensors = {m.name: torch.randn(m.rows, m.cols) / m.cols**0.5 for m in layout.matrices}
        tensors |= {b.name: torch.randn(b.size) / 4 for b in layout.biases}
        made.append(encode(layout, tensors, fitted=False))
    return made


class Both:
    """The same experts by both paths."""

    def __init__(self, layout: RecordLayout, form: GateForm, experts: int):
        self.slots = records(layout, experts)
        groups = {matrix.name: matrix.group for matrix in layout.matrices}
        up = "gate_up_proj" if form.gated else "up_proj"

        def eager(rounded: bool) -> EagerExperts:
            def enter(x: Tensor, name: str) -> Tensor:
                return in_eight_bits(x, groups[name]) if rounded else x

            def math(weights: dict[str, Tensor], x: Tensor) -> Tensor:
                h = enter(x, up) @ weights[up].T + weights.get(f"{up}_bias", 0)
                inner = enter(apply_gate(form, h), "down_proj")
                return inner @ weights["down_proj"].T + weights.get("down_proj_bias", 0)

            return EagerExperts(
                lambda record, dtype: decode(layout, record, dtype),
                math,  # type: ignore[arg-type]
                lambda slot: self.slots[slot],
                lambda record, dtype: decode_int2(layout, record, dtype),
            )

        self.eager, self.rounded = eager(False), eager(True)
        self.native = NativeExperts(
            layout, form, lambda slot: self.slots[slot].data_ptr(), core().Step()
        )


def routing(tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, experts)
    weights, ids = scores.topk(k)
    return ids, weights


def arrivals(ids: Tensor, low: bool = False) -> list[list[tuple[int, int, bool]]]:
    """All but expert 0 from their heads if `low`."""
    return [[(expert, expert, low and expert > 0) for expert in ids.unique().tolist()]]


def error(have: Tensor, want: Tensor) -> float:
    return float((have - want).norm() / want.norm())


def in_eight_bits(x: Tensor, group: int) -> Tensor:
    grouped = x.view(len(x), -1, group)
    most = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # As the kernels do: a value midway between two codes would go the other way by division.
    return ((grouped * (127 / most)).round() * (most / 127)).view_as(x)


def check(both: Both, hidden: int, tokens: int, experts: int, k: int, low: bool = False) -> None:
    ids, weights = routing(tokens, experts, k)
    x, arriving = torch.randn(tokens, hidden), arrivals(ids, low)
    have = both.native(x, ids, weights, arriving)
    assert error(have, both.eager(x, ids, weights, arriving)) < BOUND
    assert error(have, both.rounded(x, ids, weights, arriving)) < SAME_ROUNDING


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 33, 512])
def test_one_to_many_tokens(tokens: int) -> None:
    check(Both(layout_of(128, 64), PLAIN, 8), 128, tokens, 8, 3)


@pytest.mark.parametrize(
    ("hidden", "inner"),
    [(32, 32), (96, 32), (160, 96), (64, 416), (1120, 64), (576, 224), (2048, 1408)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_shapes(hidden: int, inner: int, bits: int) -> None:
    both = Both(layout_of(hidden, inner, bits), PLAIN, 4)
    for tokens in (1, 7):
        check(both, hidden, tokens, 4, 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_activation(form: GateForm) -> None:
    for biased in (False, True):
        both = Both(layout_of(128, 96, gated=form.gated, biased=biased), form, 4)
        for tokens in (1, 9):
            check(both, 128, tokens, 4, 2)


@pytest.mark.parametrize(("hidden", "inner"), [(128, 64), (160, 96)])
def test_two_bits_from_the_head(hidden: int, inner: int) -> None:
    both = Both(layout_of(hidden, inner), PLAIN, 6)
    for tokens in (1, 11):
        check(both, hidden, tokens, 6, 3, low=True)
    ids, weights = routing(5, 6, 3)
    x = torch.randn(5, hidden)
    two = both.native(x, ids, weights, arrivals(ids, low=True))
    assert error(two, both.native(x, ids, weights, arrivals(ids))) > 0.1


def test_order_and_pieces_of_arrival_do_not_show() -> None:
    both = Both(layout_of(128, 64), PLAIN, 8)
    for tokens in (1, 6):
        ids, weights = routing(tokens, 8, 4)
        x = torch.randn(tokens, 128)
        whole = arrivals(ids)
        single = [[one] for one in reversed(whole[0])]
        assert torch.equal(
            both.native(x, ids, weights, whole), both.native(x, ids, weights, single)
        )


def test_a_token_s_sum_goes_by_expert_not_by_rank() -> None:
    both = Both(layout_of(128, 64), PLAIN, 8)
    for tokens in (1, 6):
        ids, weights = routing(tokens, 8, 4)
        x = torch.randn(tokens, 128)
        turned = both.native(x, ids.flip(1), weights.flip(1), arrivals(ids))
        assert torch.equal(both.native(x, ids, weights, arrivals(ids)), turned)


def test_threads_do_not_show() -> None:
    both = Both(layout_of(256, 192), PLAIN, 8)
    before = core().threads()
    try:
        for tokens in (1, 40):
            ids, weights = routing(tokens, 8, 4)
            x = torch.randn(tokens, 256)
            out = []
            for threads in (1, 2, 5):
                core().set_threads(threads)
                out.append(both.native(x, ids, weights, arrivals(ids)))
            assert torch.equal(out[0], out[1])
            assert torch.equal(out[0], out[2])
    finally:
        core().set_threads(before)


def test_an_id_beyond_the_experts_means_none() -> None:
    both = Both(layout_of(64, 64), PLAIN, 4)
    x = torch.randn(1, 64)
    weights = torch.tensor([[0.6, 0.4]])
    alone = both.native(x, torch.tensor([[2]]), weights[:, :1], [[(2, 2, False)]])
    assert torch.equal(both.native(x, torch.tensor([[2, 4]]), weights, [[(2, 2, False)]]), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    both = Both(layout_of(128, 64), PLAIN, 4)
    ids, weights = routing(3, 4, 2)
    x = torch.randn(3, 128, dtype=dtype)
    have = both.native(x, ids, weights.to(dtype), arrivals(ids))
    assert have.dtype is dtype
    want = both.eager(x.float(), ids, weights, arrivals(ids))
    assert error(have.float(), want) < BOUND


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 32), (5, 1408), (33, 96), (70, 128), (200, 4096), (17, 160), (12, 128), (31, 96)],
)
def test_a_matrix_is_exact_but_for_the_rounding_of_x(rows: int, cols: int, bits: int) -> None:
    group = 64 if cols % 64 == 0 else 32
    layout = RecordLayout((MatrixSpec("weight", rows, cols, group),), bits=bits)
    torch.manual_seed(rows)
    record = encode(layout, {"weight": torch.randn(rows, cols)}, fitted=False)
    weight = decode(layout, record, torch.float32)["weight"]
    place, bias = matrix_place(layout, 0), torch.randn(rows)
    for tokens in (1, 2, 3, 4, 5, 37):
        x, y = torch.randn(tokens, cols), torch.empty(tokens, rows)
        core().linear(place, record.data_ptr(), bias.data_ptr(), x.data_ptr(), tokens, y.data_ptr())
        want = in_eight_bits(x, group).double() @ weight.double().T + bias
        assert error(y.double(), want) < 2e-6


def test_zeros_and_large_values() -> None:
    layout = RecordLayout((MatrixSpec("weight", 40, 128, 64),))
    record = encode(layout, {"weight": torch.randn(40, 128)}, fitted=False)
    weight = decode(layout, record, torch.float32)["weight"]
    x = torch.zeros(3, 128)
    x[1, 5], x[2] = 3e30, 1e-30
    y = torch.full((3, 40), 7.0)
    core().linear(matrix_place(layout, 0), record.data_ptr(), 0, x.data_ptr(), 3, y.data_ptr())
    assert torch.equal(y[0], torch.zeros(40))
    for row in (1, 2):
        assert error(y[row].double(), x[row].double() @ weight.double().T) < 0.01


def test_shapes_that_do_not_fit_are_refused() -> None:
    native = core()
    with pytest.raises(ValueError, match="groups of 64 or 32"):
        native.MatrixPlace(4, 100, 64, 4, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="bits"):
        native.MatrixPlace(4, 64, 64, 16, 0, 0, 0, 0)
    up, down = (
        native.MatrixPlace(64, 64, 64, 4, 0, 0, 0, 0),
        native.MatrixPlace(64, 64, 64, 4, 0, 0, 0, 0),
    )
    gate = native.Gate(native.Act.SILU, 1.0, float("inf"), 0.0, False)
    with pytest.raises(ValueError, match="do not fit"):
        native.ExpertShape(up, down, True, False, gate, -1, -1)
    with pytest.raises(ValueError, match="no kernels named"):
        native.use_isa("abacus")
