"""Which weights do some rows of a record of one matrix hold?

`codec.decode` rebuilds a whole expert, and needs many times its bytes. A vocabulary's matrix is as
large as hundreds of experts, and an embedding asks for a few of its rows: so here only those are
unpacked. Invariant: the rows are `decode`'s, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fate_moe.quant.record import MatrixOffsets, MatrixSpec, RecordLayout

ROW_BYTES_PER_WEIGHT = 24
"""Most memory that unpacking takes, in bytes a weight: codes, float32 weights, a cast."""


def decode_rows(layout: RecordLayout, record: Tensor, rows: Tensor) -> Tensor:
    """Rebuild some rows of a matrix.

    Args:
        layout: of one matrix.
        record: uint8 [record_bytes], of values as they are without what pads it.
        rows: which, int64 [n], in any order.
    Returns:
        float32 [n, cols].
    Raises:
        IndexError: the matrix has no such row.
    """
    (matrix,), (at,) = layout.matrices, layout.offsets
    if layout.is_unquantized:
        size = matrix.rows * matrix.cols * layout.bits // 8
        values = record[:size].view(getattr(torch, layout.dtype)).view(matrix.rows, matrix.cols)
        return values.index_select(0, rows).float()
    halves = [
        _rows(record, start, matrix.meta_bytes, matrix, rows) for start in (at.scale, at.zero)
    ]
    scale, zero = (half.view(torch.float16).float().view(-1, 1) for half in halves)
    codes = _codes(record, layout.bits, matrix, at, rows)
    return codes.to(torch.float32).sub_(zero).mul_(scale).view(-1, matrix.cols)


def _rows(record: Tensor, start: int, size: int, matrix: MatrixSpec, rows: Tensor) -> Tensor:
    return record[start : start + size].view(matrix.rows, -1).index_select(0, rows)


def _codes(
    record: Tensor, bits: int, matrix: MatrixSpec, at: MatrixOffsets, rows: Tensor
) -> Tensor:
    """Unpack the codes of some rows: uint8 [n * groups, group]."""
    if bits == 8:
        size = matrix.rows * matrix.cols
        return _rows(record, at.values, size, matrix, rows).view(-1, matrix.group)
    high, low = (
        _rows(record, start, matrix.plane_bytes, matrix, rows).view(-1, 1, matrix.group // 4)
        for start in (at.high, at.low)
    )
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=record.device).view(1, 4, 1)
    pairs = ((high >> shifts) & 3) << 2
    return pairs.bitwise_or_((low >> shifts) & 3).view(-1, matrix.group)
