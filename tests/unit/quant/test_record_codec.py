"""Does a record hold the bytes the format promises, and do both views read them back?"""

import pytest
import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.quantize import quantize
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout

LAYOUT = RecordLayout(
    (MatrixSpec("up", 8, 128, 64), MatrixSpec("down", 16, 96, 32)), (BiasSpec("up_bias", 8),)
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "up": torch.randn(8, 128, generator=generator) * 0.02,
        "down": torch.randn(16, 96, generator=generator) * 0.05,
        "up_bias": torch.randn(8, generator=generator),
    }


def naive_codes(record: bytes, start: int, matrix: MatrixSpec) -> list[int]:
    """Unpack a plane byte by byte, straight from the format's words."""
    quarter = matrix.group // 4
    values = []
    for group in range(matrix.rows * matrix.groups):
        for weight in range(matrix.group):
            byte = record[start + group * quarter + weight % quarter]
            values.append(byte >> 2 * (weight // quarter) & 3)
    return values


def test_planes_are_laid_out_as_documented(tensors: dict[str, Tensor]) -> None:
    record = bytes(encode(LAYOUT, tensors).tolist())
    for matrix, at in zip(LAYOUT.matrices, LAYOUT.offsets, strict=True):
        codes, scale, zero = quantize(tensors[matrix.name], matrix.group)
        assert naive_codes(record, at.high, matrix) == (codes >> 2).flatten().tolist()
        assert naive_codes(record, at.low, matrix) == (codes & 3).flatten().tolist()
        assert record[at.scale :][: matrix.meta_bytes] == scale.numpy().tobytes()
        assert record[at.zero :][: matrix.meta_bytes] == zero.numpy().tobytes()
    bias = record[LAYOUT.bias_offsets[0] :][:32]
    assert bias == tensors["up_bias"].numpy().tobytes()


def test_padding_is_zero_and_encoding_deterministic(tensors: dict[str, Tensor]) -> None:
    record = encode(LAYOUT, tensors)
    last = LAYOUT.offsets[-1].low + LAYOUT.matrices[-1].plane_bytes
    assert record.numel() == LAYOUT.record_bytes
    assert not record[last:].any()
    assert torch.equal(record, encode(LAYOUT, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_exactly_code_minus_zero_times_scale(
    tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    out = decode(LAYOUT, encode(LAYOUT, tensors), dtype)
    assert list(out) == ["up", "down", "up_bias"]
    for matrix in LAYOUT.matrices:
        codes, scale, zero = quantize(tensors[matrix.name], matrix.group)
        repeat = matrix.group
        zeros = zero.float().repeat_interleave(repeat, 1)
        want = (codes.float() - zeros) * scale.float().repeat_interleave(repeat, 1)
        assert torch.equal(out[matrix.name], want.to(dtype))
        assert out[matrix.name].is_contiguous()
    assert torch.equal(out["up_bias"], tensors["up_bias"].to(dtype))


def test_decode_int2_reads_the_head_alone(tensors: dict[str, Tensor]) -> None:
    record = encode(LAYOUT, tensors)
    head = record[: LAYOUT.head_bytes].clone()
    out = decode_int2(LAYOUT, head, torch.float32)
    for matrix in LAYOUT.matrices:
        codes, scale, zero = quantize(tensors[matrix.name], matrix.group)
        high = (codes >> 2).float()
        zero2 = ((zero.float() - 1.5) / 4).repeat_interleave(matrix.group, 1)
        want = (high - zero2) * (4 * scale.float()).repeat_interleave(matrix.group, 1)
        assert torch.equal(out[matrix.name], want)
        weight = tensors[matrix.name]
        assert ((out[matrix.name] - weight).norm() / weight.norm()).item() < 0.4
    assert torch.equal(out["up_bias"], tensors["up_bias"])


def test_the_int4_view_is_closer_than_the_int2_view(tensors: dict[str, Tensor]) -> None:
    record = encode(LAYOUT, tensors)
    four, two = decode(LAYOUT, record, torch.float32), decode_int2(LAYOUT, record, torch.float32)
    for name in ("up", "down"):
        weight = tensors[name]
        assert (four[name] - weight).norm() < 0.3 * (two[name] - weight).norm()


def test_results_do_not_alias_the_slot(tensors: dict[str, Tensor]) -> None:
    slot = encode(LAYOUT, tensors)
    for view in (decode, decode_int2):
        out = view(LAYOUT, slot, torch.float32)
        before = {name: tensor.clone() for name, tensor in out.items()}
        kept = slot.clone()
        slot.fill_(255)
        assert all(torch.equal(out[name], before[name]) for name in out)
        slot.copy_(kept)


def test_a_longer_or_unaligned_slot_is_fine(tensors: dict[str, Tensor]) -> None:
    record = encode(LAYOUT, tensors)
    slot = torch.zeros(LAYOUT.record_bytes + 61, dtype=torch.uint8)
    for shift in (0, 3, 8):
        slot[shift : shift + len(record)] = record
        out = decode(LAYOUT, slot[shift:], torch.float32)
        assert torch.equal(out["down"], decode(LAYOUT, record, torch.float32)["down"])


def test_a_short_or_wrong_record_is_refused(tensors: dict[str, Tensor]) -> None:
    record = encode(LAYOUT, tensors)
    with pytest.raises(FormatError, match="must be uint8"):
        decode(LAYOUT, record[:-1], torch.float32)
    with pytest.raises(FormatError, match="must be uint8"):
        decode_int2(LAYOUT, record[: LAYOUT.head_bytes - 1], torch.float32)
    with pytest.raises(FormatError, match="must be uint8"):
        decode(LAYOUT, record.to(torch.int8), torch.float32)


def test_encode_names_what_is_wrong(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="layer 3: parameters"):
        encode(LAYOUT, {"up": tensors["up"]}, where="layer 3")
    with pytest.raises(ModelError, match=r"up has shape \(128, 8\)"):
        encode(LAYOUT, tensors | {"up": tensors["up"].mT})
    with pytest.raises(ModelError, match="layer 3: up_bias holds NaN"):
        encode(LAYOUT, tensors | {"up_bias": torch.full((8,), float("nan"))}, where="layer 3")
    with pytest.raises(ModelError, match="layer 3: down holds NaN"):
        encode(LAYOUT, tensors | {"down": tensors["down"] / 0}, where="layer 3")


@pytest.mark.parametrize("fitted", [True, False])
def test_eight_bits_are_plain_codes(tensors: dict[str, Tensor], fitted: bool) -> None:
    layout = RecordLayout(LAYOUT.matrices, LAYOUT.biases, 8)
    encoded = encode(layout, tensors, fitted=fitted)
    record = bytes(encoded.tolist())
    out = decode(layout, encoded, torch.float32)
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        codes, scale, zero = quantize(tensors[matrix.name], matrix.group, bits=8, fitted=fitted)
        assert record[at.values :][: codes.numel()] == codes.numpy().tobytes()
        assert record[at.scale :][: matrix.meta_bytes] == scale.numpy().tobytes()
        assert record[at.zero :][: matrix.meta_bytes] == zero.numpy().tobytes()
        zeros = zero.float().repeat_interleave(matrix.group, 1)
        want = (codes.float() - zeros) * scale.float().repeat_interleave(matrix.group, 1)
        assert torch.equal(out[matrix.name], want)
    assert torch.equal(out["up_bias"], tensors["up_bias"])
    assert not any(record[layout.head_bytes :])


def test_the_choice_of_scales_reaches_the_record(tensors: dict[str, Tensor]) -> None:
    for bits in (4, 8):
        layout = RecordLayout(LAYOUT.matrices, LAYOUT.biases, bits)
        fitted, plain = (encode(layout, tensors, fitted=choice) for choice in (True, False))
        assert not torch.equal(fitted, plain)


def plain_layout(dtype: torch.dtype) -> RecordLayout:
    name = str(dtype).removeprefix("torch.")
    matrices = (MatrixSpec("up", 8, 50, 0), MatrixSpec("down", 3, 7, 0))
    return RecordLayout(matrices, (BiasSpec("up_bias", 8),), 8 * dtype.itemsize, name)


def plain_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Every bit pattern may occur: NaN, infinity, -0.0 and subnormals among them."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(3)
    shapes = {"up": (8, 50), "down": (3, 7)}
    found = {
        name: torch.randint(
            limits.min, limits.max, shape, dtype=integers, generator=generator
        ).view(dtype)
        for name, shape in shapes.items()
    }
    found["up"][0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0], dtype=dtype)
    return found | {"up_bias": torch.randn(8, generator=generator)}


VALUES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", VALUES)
def test_unquantized_values_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    layout, tensors = plain_layout(dtype), plain_tensors(dtype)
    record = encode(layout, tensors)
    out = decode(layout, record, dtype)
    assert list(out) == ["up", "down", "up_bias"]
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        name, bits = matrix.name, tensors[matrix.name].view(torch.uint8)
        assert (out[name].dtype, out[name].shape) == (dtype, (matrix.rows, matrix.cols))
        assert torch.equal(out[name].contiguous().view(torch.uint8), bits)
        assert torch.equal(record[at.values :][: bits.numel()], bits.flatten())
    assert torch.equal(out["up_bias"], tensors["up_bias"].to(dtype))
    assert not record[layout.head_bytes :].any()


@pytest.mark.parametrize("dtype", VALUES)
def test_unquantized_values_are_cast_to_the_models_dtype(dtype: torch.dtype) -> None:
    layout, tensors = plain_layout(dtype), plain_tensors(dtype)
    slot = torch.zeros(layout.record_bytes + 61, dtype=torch.uint8)
    for shift in (0, 3, 8):  # an unaligned slot too
        slot[shift : shift + layout.record_bytes] = encode(layout, tensors)
        for other in VALUES:
            out = decode(layout, slot[shift:], other)
            for name in ("up", "down"):
                want = tensors[name].to(other)
                assert torch.equal(out[name].view(torch.uint8), want.view(torch.uint8))


def test_only_unquantized_matrices_without_a_cast_are_views() -> None:
    layout, tensors = plain_layout(torch.bfloat16), plain_tensors(torch.bfloat16)
    slot = encode(layout, tensors)
    same, wider = decode(layout, slot, torch.bfloat16), decode(layout, slot, torch.float32)
    kept = {name: value.clone() for name, value in (same | wider).items()}
    slot.fill_(0)
    assert not same["up"].any()  # nothing was copied
    assert same["up_bias"].any()
    assert all(value.equal(kept[name]) for name, value in wider.items() if name != "up")


def test_a_narrower_source_is_widened_and_a_wider_one_refused() -> None:
    tensors = plain_tensors(torch.bfloat16)
    wide = decode(
        plain_layout(torch.float32), encode(plain_layout(torch.float32), tensors), torch.float32
    )
    assert torch.equal(wide["down"].nan_to_num(), tensors["down"].float().nan_to_num())
    for dtype, record in (("float32", torch.bfloat16), ("bfloat16", torch.float16)):
        source = plain_tensors(getattr(torch, dtype))
        with pytest.raises(ModelError, match=rf"layer 3: up is {dtype}, .* would round it"):
            encode(plain_layout(record), source, where="layer 3")


def test_only_four_bits_have_a_head() -> None:
    layouts = (RecordLayout(LAYOUT.matrices, (), 8), plain_layout(torch.float32))
    for layout in layouts:
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        with pytest.raises(FormatError, match=f"a record of {layout.bits} bits has no INT2 head"):
            decode_int2(layout, record, torch.float32)
