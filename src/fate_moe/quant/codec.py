"""How do weights become a record, and a record weights again?

`decode` is on the hot path of the reference engine: it unpacks eight codes per operation (int64
lanes, shift and mask), so a matrix costs about ten torch calls. The native kernels read the same
bytes without it. Invariants: of codes, `decode(encode(x))` holds exactly `(q - zero) * scale` in
float32, then cast; of unquantized values it holds those values, bit for bit, then cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.quant.grid import Grid, better
from fate_moe.quant.quantize import MAX_CODE, Quantized, quantize
from fate_moe.quant.record import MatrixOffsets, MatrixSpec, RecordLayout

_TWO_BITS = 0x0303030303030303  # the lowest bit pair of each byte of an int64 lane


def encode(
    layout: RecordLayout,
    tensors: Mapping[str, Tensor | Quantized],
    *,
    grids: Mapping[str, Grid] | None = None,
    fitted: bool = True,
    where: str = "",
) -> Tensor:
    """Turn one expert into a record: quantize it, or keep its values.

    Args:
        layout: the record layout of the expert's layer.
        tensors: float matrices [rows, cols] and biases [size] under the layout's names. A matrix
            of codes is kept as it is; its groups must be the layout's.
        grids: of matrices that lie on one, with the layout's groups: used where it loses less.
        fitted: scales of the least error; if not, plain min-max.
        where: the expert in words, put before the parameter's name in errors.
    Returns:
        uint8 [record_bytes]; padding is zero.
    Raises:
        ModelError: a tensor is missing, unknown, of the wrong shape, or cannot be stored.
    """
    prefix = f"{where}: " if where else ""
    _check_shapes(layout, tensors, prefix)
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        weight, name = tensors[matrix.name], prefix + matrix.name
        if layout.is_unquantized:
            _put(record, at.values, _unrounded(weight, layout, name))
            continue
        if isinstance(weight, Quantized):
            _check_codes(weight, matrix, layout.bits, name)
            codes, scale, zero = weight
        else:
            found = quantize(weight, matrix.group, bits=layout.bits, fitted=fitted, name=name)
            grid = (grids or {}).get(matrix.name)
            codes, scale, zero = better(weight, found, grid, bits=layout.bits) if grid else found
        _put(record, at.scale, scale)
        _put(record, at.zero, zero)
        if layout.bits == 8:
            _put(record, at.values, codes)
        else:
            _put(record, at.high, _pack_plane(codes >> 2, matrix.group))
            _put(record, at.low, _pack_plane(codes & 3, matrix.group))
    for bias, start in zip(layout.biases, layout.bias_offsets, strict=True):
        values = _floats(tensors[bias.name], prefix + bias.name).float()
        if not torch.isfinite(values).all():
            raise ModelError(f"{prefix}{bias.name} holds NaN or infinity")
        _put(record, start, values)
    return record


def decode(layout: RecordLayout, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rebuild the expert.

    Unquantized matrices that need no cast are views of the record: finish with them before the
    record's slot may be filled again, which is before the lease ends. All else are copies.

    Args:
        layout: the record layout of the expert's layer.
        record: uint8 [>= record_bytes], contiguous; longer slots are fine.
        dtype: the model's dtype.
    Returns:
        Contiguous matrices [rows, cols] and biases [size] in `dtype`, on the record's device.
    Raises:
        FormatError: the record is too short or not uint8.
    Cost: one core, 55 k weights about 0.2 ms, 8.7 M weights about 11 ms (AVX2 server, 2026).
    """
    record = _checked(record, layout.record_bytes)
    if layout.is_unquantized:
        return _values(layout, record, dtype) | _biases(layout, record, dtype)
    halves = _halves(layout, record)
    out: dict[str, Tensor] = {}
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        if layout.bits == 8:
            codes = record[at.values :][: matrix.rows * matrix.cols].view(-1, matrix.group)
        else:
            high, low = _unpack(record, matrix, at.high, at.low)
            codes = _in_order(low.add_(high, alpha=4), matrix)
        out[matrix.name] = _weights(codes, matrix, *_meta(halves, at, matrix)).to(dtype)
    return out | _biases(layout, record, dtype)


def decode_int2(layout: RecordLayout, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rebuild the nested INT2 expert from the head of a record.

    The high plane alone puts each weight in the middle of the four codes it may have been:
    `(high - zero2) * scale2` with `scale2 = 4 * scale` and `zero2 = (zero - 1.5) / 4`.

    Args:
        layout: the record layout of the expert's layer.
        record: uint8 [>= head_bytes]; bytes beyond the head are not read.
        dtype: the model's dtype.
    Returns: as `decode`.
    Raises:
        FormatError: the record is too short or not uint8, or its layout has no planes.
    """
    if layout.bits != 4:
        raise FormatError(f"a record of {layout.bits} bits has no INT2 head; only 4 bits have one")
    record = _checked(record, layout.head_bytes)
    halves = _halves(layout, record)
    out: dict[str, Tensor] = {}
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        scale, zero = _meta(halves, at, matrix)
        codes = _in_order(_unpack(record, matrix, at.high)[0], matrix)
        out[matrix.name] = _weights(codes, matrix, scale * 4, (zero - 1.5) / 4).to(dtype)
    return out | _biases(layout, record, dtype)


def _checked(record: Tensor, need: int) -> Tensor:
    if record.dtype != torch.uint8 or record.dim() != 1 or record.numel() < need:
        raise FormatError(
            f"a record must be uint8 [>= {need}], got {record.dtype} {tuple(record.shape)}"
        )
    record = record[:need]
    # Lanes of int64 need 8-byte alignment; slots always have it.
    return record if record.storage_offset() % 8 == 0 else record.clone()


def _put(record: Tensor, start: int, section: Tensor) -> None:
    data = section.contiguous().view(-1).view(torch.uint8)
    record[start : start + data.numel()] = data


def _check_shapes(
    layout: RecordLayout, tensors: Mapping[str, Tensor | Quantized], prefix: str
) -> None:
    expected: dict[str, tuple[int, ...]] = {m.name: (m.rows, m.cols) for m in layout.matrices}
    expected |= {b.name: (b.size,) for b in layout.biases}
    if set(tensors) != set(expected):
        raise ModelError(f"{prefix}parameters {sorted(tensors)}, the layout has {sorted(expected)}")
    for name, shape in expected.items():
        tensor = tensors[name]
        found = tuple((tensor.codes if isinstance(tensor, Quantized) else tensor).shape)
        if found != shape:
            raise ModelError(f"{prefix}{name} has shape {found}, the layout has {shape}")


def _check_codes(weight: Quantized, matrix: MatrixSpec, bits: int, name: str) -> None:
    need = (matrix.rows, matrix.groups)
    if not weight.scale.shape == weight.zero.shape == need:
        raise ModelError(f"{name} has scales {tuple(weight.scale.shape)}, need {need}")
    if int(weight.codes.max()) > MAX_CODE[bits]:
        raise ModelError(f"{name} holds the code {int(weight.codes.max())}, need {bits} bits")
    if not (torch.isfinite(weight.scale).all() and torch.isfinite(weight.zero).all()):
        raise ModelError(f"{name} holds NaN or infinity")


def _floats(tensor: Tensor | Quantized, name: str) -> Tensor:
    if isinstance(tensor, Quantized):
        raise ModelError(f"{name} is codes, need values")
    return tensor


def _unrounded(tensor: Tensor | Quantized, layout: RecordLayout, name: str) -> Tensor:
    """Bring values to the layout's dtype, which must hold each of them exactly."""
    weight, dtype = _floats(tensor, name), _value_dtype(layout)
    if torch.promote_types(weight.dtype, dtype) != dtype:
        have = str(weight.dtype).removeprefix("torch.")
        raise ModelError(f"{name} is {have}, a record of {layout.dtype} would round it")
    return weight.to(dtype)


def _values(layout: RecordLayout, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    values = record.view(_value_dtype(layout))
    size = values.element_size()
    out: dict[str, Tensor] = {}
    for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
        weight = values[at.values // size :][: matrix.rows * matrix.cols]
        out[matrix.name] = weight.view(matrix.rows, matrix.cols).to(dtype)
    return out


def _value_dtype(layout: RecordLayout) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype


def _pack_plane(pairs: Tensor, group: int) -> Tensor:
    """Pack values 0..3 [rows, cols] into bytes [rows * cols / 4], group-strided."""
    parts = pairs.view(-1, 4, group // 4)  # byte j of a group: weights j, j+G/4, j+2G/4, j+3G/4
    return parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6


def _unpack(record: Tensor, matrix: MatrixSpec, *starts: int) -> Tensor:
    """Unpack the planes at `starts` into int64 lanes [planes, 4, plane_bytes / 8].

    Entry [p, i] holds the i-th quarter of every group, eight values 0..3 to a lane.
    """
    lanes = record.view(torch.int64)[starts[0] // 8 :]
    count = matrix.plane_bytes // 8
    step = (starts[-1] - starts[0]) // 8
    lanes = lanes.as_strided((len(starts), 1, count), (step, count, 1))
    # An arithmetic shift drags in neighbouring bits and the sign; the mask removes both.
    return (lanes >> _shifts(record.device)).bitwise_and_(_TWO_BITS)


@cache
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8, 2, device=device).view(1, 4, 1)


def _in_order(quarters: Tensor, matrix: MatrixSpec) -> Tensor:
    """Bring lanes [4, rows * groups * group / 32] into weight order: uint8 [-1, group].

    A quarter of a group is one or two lanes; it moves as one element, for which torch has a wide
    enough dtype only under the name complex128. Nothing is computed in it.
    """
    element = torch.int64 if matrix.group == 32 else torch.complex128
    moved = quarters.view(element).mT.contiguous()
    return moved.view(torch.uint8).view(-1, matrix.group)


def _halves(layout: RecordLayout, record: Tensor) -> Tensor:
    """Read the metadata as fp16 and widen it to float32 [high plane start / 2], in one go."""
    return record[: layout.offsets[0].high].view(torch.float16).float()


def _meta(halves: Tensor, at: MatrixOffsets, matrix: MatrixSpec) -> tuple[Tensor, Tensor]:
    """Take scale and zero as float32 [rows * groups, 1]."""
    scale = halves[at.scale // 2 : (at.scale + matrix.meta_bytes) // 2]
    zero = halves[at.zero // 2 : (at.zero + matrix.meta_bytes) // 2]
    return scale.view(-1, 1), zero.view(-1, 1)


def _weights(codes: Tensor, matrix: MatrixSpec, scale: Tensor, zero: Tensor) -> Tensor:
    """Turn codes uint8 [rows * groups, group] into float32 weights [rows, cols]."""
    weights = codes.to(torch.float32)
    return weights.sub_(zero).mul_(scale).view(matrix.rows, matrix.cols)


def _biases(layout: RecordLayout, record: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for bias, start in zip(layout.biases, layout.bias_offsets, strict=True):
        values = record[start : start + 4 * bias.size].view(torch.float32)
        out[bias.name] = values.to(dtype, copy=True)  # never a view of a slot that may be reused
    return out
