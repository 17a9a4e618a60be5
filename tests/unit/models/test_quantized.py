"""Layers that are records compute what their matrices say, natively or not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe import native
from fate_moe.models import quantized
from fate_moe.models.quantized import RecordEmbedding, RecordLinear, use_native
from fate_moe.quant.codec import decode, encode
from fate_moe.quant.record import MatrixSpec, RecordLayout
from fate_moe.quant.rows import decode_rows

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_record(rows: int, cols: int, bits: int) -> tuple[RecordLayout, Tensor, Tensor]:
    """Return a layout, a record of random weights, and what it decodes to."""
    layout = RecordLayout((MatrixSpec("weight", rows, cols, 32 if cols % 64 else 64),), bits=bits)
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    record = encode(layout, {"weight": weights})
    return layout, record, decode(layout, record, torch.float32)["weight"]


def make_linear(rows: int, cols: int, bits: int, *, bias: bool = False) -> RecordLinear:
    layout, record, _ = make_record(rows, cols, bits)
    linear = RecordLinear(layout, nn.Parameter(torch.randn(rows)) if bias else None, torch.float32)
    linear.record = record
    return linear


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols"), [(33, 64), (40, 96), (257, 320)])
def test_rows_are_those_of_the_decoded_matrix(rows: int, cols: int, bits: int) -> None:
    layout, record, weights = make_record(rows, cols, bits)
    some = torch.tensor([rows - 1, 0, 7, 7])
    assert torch.equal(decode_rows(layout, record, some), weights[some])
    assert torch.equal(decode_rows(layout, record, torch.arange(rows)), weights)
    for outside in (rows, -1):
        with pytest.raises(IndexError):
            decode_rows(layout, record, torch.tensor([outside]))


def make_plain(rows: int, cols: int, *, bias: bool = False) -> tuple[RecordLinear, Tensor]:
    """Return a layer whose record is bfloat16 values, and those values widened."""
    layout = RecordLayout((MatrixSpec("weight", rows, cols, 0),), bits=16, dtype="bfloat16")
    values = torch.randn(rows, cols).bfloat16()
    linear = RecordLinear(layout, nn.Parameter(torch.randn(rows)) if bias else None, torch.float32)
    linear.record = values.view(torch.uint8).flatten()
    return linear, values.float()


@pytest.mark.parametrize("natively", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize(("rows", "cols"), [(33, 64), (257, 320)])
def test_values_as_they_are(rows: int, cols: int, tokens: int, natively: bool) -> None:
    linear, weights = make_plain(rows, cols, bias=True)
    linear.native = natively
    x = torch.randn(1, tokens, cols)
    want = F.linear(x.double(), weights.double(), linear.bias.double())  # type: ignore[union-attr]
    assert torch.allclose(linear(x).double(), want, rtol=0, atol=1e-4)
    assert torch.equal(linear.weight, weights)
    assert linear(x.bfloat16()).dtype is torch.bfloat16


@needs_native
def test_values_as_they_are_give_a_token_the_same_bits_alone_and_among_others() -> None:
    linear, _ = make_plain(257, 320)
    x = torch.randn(19, 320)
    assert torch.equal(linear(x), torch.cat([linear(one) for one in x.split(1)]))


def test_an_embedding_of_values_as_they_are() -> None:
    linear, weights = make_plain(40, 96)
    embedding = RecordEmbedding(linear.layout, None, torch.float32)
    embedding.record = linear.record
    ids = torch.tensor([[3, 39, 0]])
    assert torch.equal(embedding(ids), F.embedding(ids, weights))


def rounded(x: Tensor, group: int) -> Tensor:
    """Half a step of int8 for each value of x [..., cols], whose groups have a scale each."""
    groups = x.abs().view(*x.shape[:-1], -1, group)
    half_steps = groups.amax(-1, keepdim=True) / 127 / 2
    return half_steps.expand_as(groups).reshape(x.shape)


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(("rows", "cols"), [(33, 64), (40, 96), (257, 320)])
def test_native_is_the_matrix_product_but_for_rounded_inputs(
    rows: int, cols: int, tokens: int, bits: int
) -> None:
    linear = make_linear(rows, cols, bits, bias=True)
    assert linear.native
    x = torch.randn(1, tokens, cols)
    weights, y = linear.weight, linear(x)
    exact = F.linear(x, weights, linear.bias)
    # No input is off by more than half a step, whatever the group's size is up to a row.
    bound = F.linear(rounded(x, cols), weights.abs()) + 1e-4
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= bound).all()
    assert not torch.equal(y, exact)  # the core was asked
    relative = (y - exact).norm() / exact.norm()
    assert relative < 0.02


@pytest.mark.parametrize("bits", [4, 8])
def test_without_the_core_it_is_the_matrix_product(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = make_linear(257, 320, bits, bias=True)
    linear.native = False
    x = torch.randn(2, 3, 320)
    exact = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x), exact, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(quantized, "_BLOCK_WEIGHTS", 320 * 100)  # several blocks, the last short
    torch.testing.assert_close(linear(x), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(linear.weight, make_record(257, 320, bits)[2])


@needs_native
def test_sixteen_bit_inputs_stay_sixteen_bit() -> None:
    linear = make_linear(64, 128, 8, bias=True)
    linear.to(torch.bfloat16)
    assert linear.record is not None
    assert linear.record.dtype is torch.uint8
    x = torch.randn(3, 128).bfloat16()
    assert linear.bias is not None
    wide = F.linear(x.float(), linear.weight, linear.bias.float())
    for wanted in (True, False):
        use_native(linear, wanted)
        y = linear(x)
        assert y.dtype is torch.bfloat16
        bound = F.linear(rounded(x.float(), 128), linear.weight.abs()) + wide.abs() / 128
        assert ((y.float() - wide).abs() <= bound + 1e-3).all()


@needs_native
def test_a_record_that_moves_is_found_again() -> None:
    linear = make_linear(64, 128, 4, bias=True)
    x = torch.randn(1, 128)
    before = linear(x)
    assert linear.record is not None
    assert linear.bias is not None
    old = linear.record
    linear.record = old.clone()
    old.zero_()
    assert torch.equal(linear(x), before)
    linear.record = linear.record.clone()
    linear.bias = nn.Parameter(linear.bias + 1)
    torch.testing.assert_close(linear(x), before + 1)


@needs_native
def test_inputs_in_any_order_and_number() -> None:
    linear = make_linear(64, 128, 4)
    x = torch.randn(128, 5)
    assert torch.equal(linear(x.mT), linear(x.mT.contiguous()))
    assert linear(torch.empty(0, 128)).shape == (0, 64)
    with pytest.raises(ValueError, match="input of width 64, need 128"):
        linear(torch.randn(1, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_is_exact(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, record, weights = make_record(300, 96, bits)
    embedding = RecordEmbedding(layout, None, torch.float32)
    embedding.record = record
    ids = torch.tensor([[0, 299, 5], [5, 1, 2]])
    assert torch.equal(embedding(ids), F.embedding(ids, weights))
    monkeypatch.setattr(quantized, "_BLOCK_WEIGHTS", 192)
    assert torch.equal(embedding(ids), F.embedding(ids, weights))
    with pytest.raises(IndexError):
        embedding(torch.tensor([300]))


def test_a_switch_that_asks_for_what_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fate_moe.errors import NativeUnavailable

    monkeypatch.setattr(native, "_module", None)
    linear = make_linear(64, 64, 4)
    assert not linear.native
    assert linear(torch.randn(1, 64)).shape == (1, 64)
    with pytest.raises(NativeUnavailable):
        use_native(linear, True)
