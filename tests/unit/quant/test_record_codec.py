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
