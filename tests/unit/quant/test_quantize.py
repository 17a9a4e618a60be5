"""Does the quantizer lose little, never more than min-max, and refuse what it cannot hold?"""

import pytest
import torch
from torch import Tensor

from fate_moe.errors import ModelError
from fate_moe.quant.quantize import _CHUNK, quantize


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    rows, cols = codes.shape
    grouped = codes.double().view(rows, scale.shape[1], -1)
    return ((grouped - zero.double()[..., None]) * scale.double()[..., None]).view(rows, cols)


def group_errors(weight: Tensor, approx: Tensor, group: int) -> Tensor:
    return (weight.double() - approx).view(-1, group).square().sum(1)


def relative(approx: Tensor, weight: Tensor) -> float:
    return ((approx - weight).norm() / weight.norm()).item()


def min_max(weight: Tensor, group: int) -> Tensor:
    """The plain quantizer, with its scale and zero rounded to fp16 as ours are."""
    flat = weight.float().view(-1, group)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scale = ((high - low) / 15).half().float()
    scale[scale == 0] = 1.0
    zero = (-low / scale).half().float()
    codes = (flat / scale + zero).round().clamp(0, 15)
    return ((codes.double() - zero.double()) * scale.double()).view(weight.shape)


def test_shapes_types_and_range() -> None:
    codes, scale, zero = quantize(torch.randn(6, 128), 64)
    assert (codes.shape, codes.dtype) == ((6, 128), torch.uint8)
    assert (scale.shape, scale.dtype) == ((6, 2), torch.float16)
    assert (zero.shape, zero.dtype) == ((6, 2), torch.float16)
    assert codes.max() <= 15


@pytest.mark.parametrize("fitted", [True, False])
def test_eight_bits_use_all_their_codes(fitted: bool) -> None:
    codes, scale, zero = quantize(torch.randn(6, 128), 64, bits=8, fitted=fitted)
    assert (codes.shape, codes.dtype) == ((6, 128), torch.uint8)
    assert scale.dtype == zero.dtype == torch.float16
    assert codes.min() < 8
    assert codes.max() > 247


def test_eight_bits_lose_far_less_than_four() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    fitted = relative(dequantize(*quantize(weight, 64, bits=8)), weight)
    plain = relative(dequantize(*quantize(weight, 64, bits=8, fitted=False)), weight)
    assert fitted < 0.98 * plain
    assert fitted < 0.0053  # INT4: 0.083
    assert 16 * fitted < relative(dequantize(*quantize(weight, 64)), weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
def test_min_max_scales_span_each_group_and_zero(bits: int, shift: float) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)) * 0.05 + shift
    codes, scale, zero = quantize(weight, 64, bits=bits, fitted=False)
    steps = 2**bits - 1
    for row in range(8):
        for index in range(2):
            group = weight[row, 64 * index : 64 * (index + 1)]
            low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
            width = scale[row, index].item()
            assert width == pytest.approx((high - low) / steps, rel=2**-11)
            assert zero[row, index].item() == pytest.approx(-low / width, rel=2**-11)
            near = (group.double() / width + zero[row, index].item()).round().clamp(0, steps)
            found = codes[row, 64 * index : 64 * (index + 1)]
            assert (found.double() - near).abs().max() <= 1  # halves round either way
            assert (found != near).sum() <= 1


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_the_nearest_one(bits: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, scale, zero = quantize(weight, 64, bits=bits)
    best = group_errors(weight, dequantize(codes, scale, zero), 1)
    for step in (-1, 1):
        other = (codes.int() + step).clamp(0, 2**bits - 1)
        errors = group_errors(weight, dequantize(other, scale, zero), 1)
        assert (best <= errors + 1e-9).all()


@pytest.mark.parametrize("group", [32, 64])
def test_gaussian_weights_lose_less_than_min_max_and_hqq(group: int) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    approx = dequantize(*quantize(weight, group))
    ours = relative(approx, weight)
    assert ours < 0.95 * relative(min_max(weight, group), weight)
    assert ours < {32: 0.074, 64: 0.0845}[group]  # HQQ with group 64: 0.086


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.02, 3e-8, -2e-5, 1234.5, 100_000.0])
def test_constant_groups(value: float, bits: int) -> None:
    weight = torch.full((2, 64), value)
    approx = dequantize(*quantize(weight, 64, bits=bits))
    assert approx.sub(value).abs().max() <= max(abs(value) * 2**-11, 6e-8)


def test_a_group_far_from_zero_keeps_its_place() -> None:
    # min-max would need a zero of -1.5 million, which is no fp16 number.
    weight = 100 + torch.rand(4, 64) * 1e-3
    assert (dequantize(*quantize(weight, 64)) - weight).abs().max() < 0.05


def test_groups_are_independent() -> None:
    weight = torch.randn(3, 192)
    whole = quantize(weight, 64)
    part = quantize(weight[1:2, 64:128].contiguous(), 64)
    assert torch.equal(whole.codes[1:2, 64:128], part.codes)
    assert torch.equal(whole.scale[1, 1], part.scale[0, 0])


def test_works_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 128)
    whole = quantize(weight, 32)
    monkeypatch.setitem(_CHUNK, "cpu", 96)
    for one, other in zip(whole, quantize(weight, 32), strict=True):
        assert torch.equal(one, other)


def test_takes_views_and_all_float_types() -> None:
    weight = torch.randn(64, 64)
    assert torch.equal(quantize(weight.mT, 64).codes, quantize(weight.mT.contiguous(), 64).codes)
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype)
        assert torch.equal(quantize(low, 64).codes, quantize(low.float(), 64).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e6, -1e30])
def test_refuses_what_fp16_scales_cannot_hold(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 17] = value
    with pytest.raises(ModelError, match=r"layers\.0\.down_proj holds"):
        quantize(weight, 64, name="layers.0.down_proj")


def test_the_largest_allowed_range_is_finite() -> None:
    weight = torch.linspace(-490_000, 490_000, 64).view(1, 64)
    approx = dequantize(*quantize(weight, 64))
    assert relative(approx, weight) < 0.07  # 16 levels


def test_eight_bits_reach_further() -> None:
    weight = torch.linspace(-8_000_000, 8_000_000, 64).view(1, 64)
    assert relative(dequantize(*quantize(weight, 64, bits=8)), weight) < 0.005
    with pytest.raises(ModelError, match=r"down holds 9e\+06, fp16 scales reach 8.35e\+06"):
        quantize(weight * 1.125, 64, bits=8, name="down")


def plainly(weight: Tensor, group: int, bits: int, fitted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same search written down without buffers and shortcuts, in one piece."""
    flat, most = weight.float().reshape(-1, group), 2**bits - 1
    best = [torch.full((len(flat), 1), value) for value in (float("inf"), 0.0, 0.0)]

    def nearest(scale: Tensor, zero: Tensor) -> Tensor:
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        return torch.addcmul(zero, flat, inverse).round().clamp(0, most)

    def offer(scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.half().float(), zero.half().float()
        codes = nearest(scale, zero)
        error = torch.linalg.vector_norm((codes - zero) * scale - flat, dim=1, keepdim=True)
        take = error < best[0]
        for i, new in enumerate((error, scale, zero)):
            best[i] = torch.where(take, new, best[i])
        return codes

    def offer_range(low: Tensor, high: Tensor) -> Tensor:
        scale = ((high - low) / most).half().float()
        scale = torch.where(scale == 0, 1.0, scale)
        return offer(scale, -low / scale)

    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    offer_range(low.clamp(max=0), high.clamp(min=0))
    for shrink in (1.0, 0.92, 0.85) if fitted else ():
        codes = offer_range(low * shrink, high * shrink)
        for _ in range(3):
            mean, center = codes.mean(1, keepdim=True), flat.mean(1, keepdim=True)
            spread = torch.linalg.vector_norm(codes, dim=1, keepdim=True).square()
            spread = spread - group * mean.square()
            along = (codes * flat).sum(1, keepdim=True) - group * mean * center
            scale = torch.where(spread > 0.5, along / spread, 1.0)
            codes = offer(scale, mean - center / scale)
    codes = nearest(best[1], best[2]).to(torch.uint8)
    rows, groups = weight.shape[0], weight.shape[1] // group
    half = [x.half().view(rows, groups) for x in best[1:]]
    return codes.view(weight.shape), half[0], half[1]


def awkward_weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "usual": (normal(96, 1408) * 0.02).bfloat16(),
        "heavy tails": normal(64, 128) ** 5,
        "mostly zero": normal(64, 128) * (normal(64, 128) > 2),
        "far from zero": 100 + normal(64, 128) * 1e-3,
        "many magnitudes": normal(256, 128) * 10 ** (2 * normal(256, 1) - 3).clamp(-9, 3),
        "few values": normal(64, 128).round(),
        "below fp16": normal(64, 128) * 1e-8,
        "constant": torch.full((2, 128), -2e-5),
    }


@pytest.mark.parametrize("name", awkward_weights())
def test_buffers_and_shortcuts_change_no_bit(name: str) -> None:
    weight = awkward_weights()[name]
    for group, bits, fitted in ((64, 4, True), (32, 4, True), (64, 8, True), (64, 4, False)):
        found = quantize(weight, group, bits=bits, fitted=fitted)
        for one, other in zip(found, plainly(weight, group, bits, fitted), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)  # no NaN in either
