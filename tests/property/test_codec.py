"""For every matrix: is the quantizer no worse than min-max, and does the record lose nothing?"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fate_moe.quant.codec import decode, encode
from fate_moe.quant.quantize import quantize
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout


def min_max_error(flat: Tensor, max_code: int) -> Tensor:
    """Squared error per group [M] of plain min-max with fp16 scale and zero; inf where it fails."""
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale = ((high - low) / max_code).half().float()
    scale[scale == 0] = 1.0
    zero = (-low / scale).half().float()
    codes = (flat / scale + zero).round().clamp(0, max_code)
    error = ((codes.double() - zero.double()) * scale.double() - flat.double()).square().sum(1)
    return torch.nan_to_num(error, nan=float("inf"))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Matrices of many kinds: Gaussian, heavy-tailed, sparse, constant, shifted, huge and tiny."""
    group = draw(st.sampled_from([32, 64]))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(rows, groups * group, generator=generator)
    weight = weight.sign() * weight.abs() ** draw(st.sampled_from([0.1, 1.0, 3.0]))
    keep = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    weight *= torch.rand(weight.shape, generator=generator) < keep
    weight += draw(st.sampled_from([0.0, 0.0, 1.0, -30.0]))
    return weight * 10.0 ** draw(st.integers(-9, 3)), group


def squared_errors(codes: Tensor, scale: Tensor, zero: Tensor, flat: Tensor) -> Tensor:
    steps = codes.view(flat.shape).double() - zero.double().view(-1, 1)
    return (steps * scale.double().view(-1, 1) - flat.double()).square().sum(1)


@settings(max_examples=200)
@given(matrices(), st.sampled_from([4, 8]))
def test_no_group_is_worse_than_min_max(case: tuple[Tensor, int], bits: int) -> None:
    weight, group = case
    codes, scale, zero = quantize(weight, group, bits=bits)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero).all()
    flat = weight.view(-1, group)
    ours = squared_errors(codes, scale, zero, flat)
    # The search compares norms in float32; a few of its last digits are the tolerance.
    slack = 1e-5 * flat.double().abs().amax(1).square() * 2**-20
    assert (ours <= min_max_error(flat, 2**bits - 1) * (1 + 1e-5) + slack).all()
    plain = squared_errors(*quantize(weight, group, bits=bits, fitted=False), flat)
    assert (ours <= plain * (1 + 1e-5) + slack).all()


@settings(max_examples=60)
@given(
    matrices(),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([4, 8]),
)
def test_a_record_gives_back_what_was_quantized(
    case: tuple[Tensor, int], bias_size: int, dtype: torch.dtype, bits: int
) -> None:
    weight, group = case
    spec = MatrixSpec("w", *weight.shape, group)
    layout = RecordLayout((spec,), (BiasSpec("b", bias_size),), bits)
    bias = torch.arange(bias_size).float() - 7.25
    out = decode(layout, encode(layout, {"w": weight, "b": bias}), dtype)
    codes, scale, zero = quantize(weight, group, bits=bits)
    grouped = codes.float().view(*scale.shape, group)
    want = (grouped - zero.float()[..., None]) * scale.float()[..., None]
    assert torch.equal(out["w"], want.view(weight.shape).to(dtype))
    assert torch.equal(out["b"], bias.to(dtype))
    assert RecordLayout.from_json(layout.to_json()) == layout
