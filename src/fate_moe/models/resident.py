"""How do the matrices besides the experts' become records while a checkpoint is converted?

A source that stands before another and hands out `P.record` where that one has `P.weight`. Rows are
quantized block by block, side by side, as they are read; only the record of one matrix is whole in
memory. What is not worth codes, or is no whole matrix in the checkpoint, is handed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fate_moe.models.checkpoint import CheckpointSource
from fate_moe.models.records import (
    LEAST_WEIGHTS,
    is_record,
    record_name,
    resident_layout,
    worth_codes,
)
from fate_moe.models.weights import FLOATS
from fate_moe.quant.codec import encode
from fate_moe.quant.record import MatrixSpec, RecordLayout
from fate_moe.store.convert import SourceLayer, SourceTensor
from fate_moe.store.format import Source
from fate_moe.store.ordered import default_jobs, in_order
from fate_moe.types import ExpertKey

_BLOCK_WEIGHTS = 1 << 20
_PIECE_BYTES = 4 << 20


class ResidentRecords:
    """A checkpoint whose large matrices besides the experts' are codes; an `ExpertSource`."""

    def __init__(
        self,
        inner: CheckpointSource,
        bits: int,
        *,
        fitted: bool = True,
        jobs: int | None = None,
        least_weights: int = LEAST_WEIGHTS,
    ) -> None:
        """Stand before `inner`.

        Args:
            bits: 4 or 8.
            fitted: scales of the least error; if not, plain min-max.
            jobs: blocks to quantize side by side; None = one per core.
            least_weights: of a matrix that becomes codes.
        """
        self._inner = inner
        self._bits = bits
        self._fitted = fitted
        self._jobs = jobs or default_jobs(_BLOCK_WEIGHTS)
        self._least_weights = least_weights

    @cached_property
    def _matrices(self) -> dict[str, tuple[SourceTensor, MatrixSpec]]:
        """Module path -> the tensor of the checkpoint, and its matrix."""
        index = self._inner.index
        matrices = worth_codes(index.skeleton, self._least_weights)
        tensors = {index.parameters.get(tensor.name): tensor for tensor in self._inner.resident}
        found = {}
        for path, matrix in matrices.items():
            tensor = tensors.get(f"{path}.weight")
            if tensor is None or tensor.dtype not in FLOATS:
                continue
            if tensor.shape == (matrix.rows, matrix.cols):
                found[path] = tensor, matrix
        return found

    @property
    def folder(self) -> Path:
        """Where config and tokenizer lie."""
        return self._inner.folder

    @property
    def source(self) -> Source:
        """Identity and hashes."""
        return self._inner.source

    @property
    def dtype(self) -> str:
        """Dtype of the experts."""
        return self._inner.dtype

    @property
    def quantization(self) -> Mapping[str, object]:
        """What decides a record; `resident_bits` where any matrix is worth it."""
        own = {"resident_bits": self._bits} if self._matrices else {}
        return {**self._inner.quantization, **own}

    @property
    def layers(self) -> Sequence[SourceLayer]:
        """MoE layers in model order."""
        return self._inner.layers

    @cached_property
    def resident(self) -> tuple[SourceTensor, ...]:
        """Everything that is no routed expert; records last, for they need no alignment."""
        gone = {tensor.name for tensor, _ in self._matrices.values()}
        kept = (tensor for tensor in self._inner.resident if tensor.name not in gone)
        records = (
            SourceTensor(record_name(path), "U8", (self._layout(matrix).record_bytes,))
            for path, (_, matrix) in self._matrices.items()
        )
        return (*kept, *records)

    def record(self, key: ExpertKey) -> memoryview:
        """Read one expert and make its record."""
        return self._inner.record(key)

    def read_resident(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one resident tensor in pieces of at most 8 MiB.

        Raises:
            ModelError: the weights cannot be quantized (NaN, infinity).
        """
        if not is_record(name):
            yield from self._inner.read_resident(name)
            return
        record = memoryview(self._quantized(name).numpy().data)
        for start in range(0, len(record), _PIECE_BYTES):
            yield record[start : start + _PIECE_BYTES]

    def small_file(self, name: str) -> bytes:
        """Read one of the small files."""
        return self._inner.small_file(name)

    def _layout(self, matrix: MatrixSpec) -> RecordLayout:
        return resident_layout(matrix, self._bits)

    def _quantized(self, name: str) -> Tensor:
        """Make a record; uint8 [record_bytes]."""
        path = next(path for path in self._matrices if record_name(path) == name)
        tensor, matrix = self._matrices[path]
        layout = self._layout(matrix)
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        start = 0

        def quantize(block: Tensor) -> tuple[RecordLayout, Tensor]:
            part = self._layout(MatrixSpec("weight", len(block), matrix.cols, matrix.group))
            return part, encode(part, {"weight": block}, fitted=self._fitted, where=path)

        blocks = _blocks(self._inner.read_resident(tensor.name), tensor, matrix)
        with closing(in_order(quantize, blocks, self._jobs)) as parts:
            for part, data in parts:
                _put(record, layout, data, part, start)
                start += part.matrices[0].rows
        return record


def _blocks(
    pieces: Iterator[memoryview], tensor: SourceTensor, matrix: MatrixSpec
) -> Iterator[Tensor]:
    """Cut the bytes of a matrix into blocks of whole rows [n, cols]."""
    dtype = FLOATS[tensor.dtype]
    row_bytes = matrix.cols * dtype.itemsize
    block_bytes = max(1, _BLOCK_WEIGHTS // matrix.cols) * row_bytes
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= block_bytes:
            yield _rows(held[:block_bytes], dtype, matrix.cols)
            held = held[block_bytes:]
    if held:
        yield _rows(held, dtype, matrix.cols)


def _rows(data: bytearray, dtype: torch.dtype, cols: int) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).view(-1, cols)


def _put(
    record: Tensor, layout: RecordLayout, data: Tensor, part: RecordLayout, start: int
) -> None:
    """Put the sections of a block of rows where they lie in the record of the whole matrix."""
    (matrix,), (block,) = layout.matrices, part.matrices
    (whole_at,), (at,) = layout.offsets, part.offsets
    planes = [(whole_at.high, at.high, matrix.cols * layout.bits // 8)]
    if layout.bits == 4:
        planes = [
            (whole_at.high, at.high, matrix.cols // 4),
            (whole_at.low, at.low, matrix.cols // 4),
        ]
    meta = 2 * matrix.groups
    sections = [(whole_at.scale, at.scale, meta), (whole_at.zero, at.zero, meta), *planes]
    for to, here, row_bytes in sections:
        size = block.rows * row_bytes
        first = to + start * row_bytes
        record[first : first + size] = data[here : here + size]
