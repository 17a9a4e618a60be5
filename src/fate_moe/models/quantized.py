"""How does a linear layer, or an embedding, compute from a record instead of from floats?

They stand in for `nn.Linear` and `nn.Embedding` of a transformers model. A linear layer asks the
native core, which rounds its input to int8 on the way where the record is codes, and computes in
float32 where it is bfloat16 values. Where the core is missing or not wanted it unpacks a few rows
at a time and multiplies as torch does. An embedding unpacks the rows asked for. Nothing unpacked is
kept. No gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe import native
from fate_moe.errors import ModelError
from fate_moe.quant.record import RecordLayout
from fate_moe.quant.rows import ROW_BYTES_PER_WEIGHT, decode_rows

_BLOCK_WEIGHTS = 1 << 20
UNPACKED_BYTES = _BLOCK_WEIGHTS * ROW_BYTES_PER_WEIGHT
"""Most memory that a layer takes to unpack rows."""


class _Recorded(nn.Module):
    """A matrix [rows, cols] that is a record.

    Attributes:
        layout: where its parts lie.
        record: uint8 [record_bytes], of values as they are without what pads it, or None before it
            is loaded. No parameter: transformers
            neither reads, casts nor initialises it.
        dtype: what the model computes in.
    """

    record: Tensor | None

    def __init__(self, layout: RecordLayout, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = layout
        self.dtype = dtype
        self.register_buffer("record", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The matrix in floats, unpacked anew each time: large, slow, for those who must look."""
        (matrix,) = self.layout.matrices
        if self.record is None:
            empty = torch.empty(matrix.rows, matrix.cols, dtype=self.dtype, device="meta")
            # What a family's initialisation may name before there are weights is left alone.
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            return empty
        blocks = [self._unpacked(rows) for rows in self._all_rows()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """Return the same layer with a matrix [rows, cols] for its record."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Describe it in a printed model."""
        (matrix,) = self.layout.matrices
        return f"{matrix.rows}, {matrix.cols}, bits={self.layout.bits}"

    def _unpacked(self, rows: Tensor) -> Tensor:
        if self.record is None:
            raise ModelError("a record of this model was not loaded")
        return decode_rows(self.layout, self.record, rows).to(self.dtype)

    def _all_rows(self) -> Iterator[Tensor]:
        (matrix,) = self.layout.matrices
        return self._blocks(torch.arange(matrix.rows))

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        (matrix,) = self.layout.matrices
        return iter(torch.split(rows, max(1, _BLOCK_WEIGHTS // matrix.cols)))


class RecordLinear(_Recorded):
    """y = x W^T + b, with W a record.

    Attributes:
        native: ask the native core; otherwise torch.
    """

    def __init__(self, layout: RecordLayout, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(layout, dtype)
        self.out_features, self.in_features = layout.matrices[0].rows, layout.matrices[0].cols
        self.bias = bias
        self.native = native.is_available()
        self._address = 0
        self._bias_address = 0
        self._bias: Tensor | None = None
        self._product: Any = None  # (address of x, tokens, address of y)

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """Return the same layer with a matrix [rows, cols] for its record."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, bias=False)
        layer.weight = weight
        layer.register_parameter("bias", self.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., cols] into [..., rows], in x's dtype."""
        # One call a matrix and token: looked up past nn.Module, whose own way costs microseconds.
        record = self._buffers["record"]
        if not self.native or record is None or not (record.is_cpu and x.is_cpu):
            return self._unpack_and_multiply(x)
        shape = x.shape
        if shape[-1] != self.in_features:
            raise ValueError(f"input of width {shape[-1]}, need {self.in_features}")
        address = record.data_ptr()
        if address != self._address:
            self._bind(address)
        dtype = x.dtype
        if dtype is not torch.float32:
            x = x.float()
        if not x.is_contiguous():
            x = x.contiguous()
        tokens = x.numel() // self.in_features
        y = torch.empty((*shape[:-1], self.out_features), dtype=torch.float32)
        if tokens:
            self._product(x.data_ptr(), tokens, y.data_ptr())
        return y if dtype is torch.float32 else y.to(dtype)

    def _bind(self, address: int) -> None:
        """Look up what every call needs, again whenever the record has moved."""
        core = native.core()
        (matrix,), (at,) = self.layout.matrices, self.layout.offsets
        self._bias = None if self.bias is None else self.bias.detach().float().contiguous()
        self._bias_address = 0 if self._bias is None else self._bias.data_ptr()
        if self.layout.is_unquantized:
            shape = matrix.rows, matrix.cols
            of_values = core.Projection.of_bfloats(*shape, address, self._bias_address)
            self._product = partial(core.project, of_values)
        else:
            place = core.MatrixPlace(
                matrix.rows, matrix.cols, matrix.group, self.layout.bits,
                at.scale, at.zero, at.high, at.low,
            )  # fmt: skip
            self._product = partial(core.linear, place, address, self._bias_address)
        self._address = address

    def _unpack_and_multiply(self, x: Tensor) -> Tensor:
        y = x.new_empty((*x.shape[:-1], self.out_features))
        start = 0
        for weights in self._all_weights():
            stop = start + len(weights)
            y[..., start:stop] = F.linear(x, weights.to(x.dtype))
            start = stop
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))

    def _all_weights(self) -> Iterator[Tensor]:
        """Return the matrix a few rows at a time; values as they are in their own dtype."""
        if not self.layout.is_unquantized or self.record is None:
            return map(self._unpacked, self._all_rows())
        values = self.record.view(getattr(torch, self.layout.dtype)).view(-1, self.in_features)
        return iter(torch.split(values, max(1, _BLOCK_WEIGHTS // self.in_features)))


class RecordEmbedding(_Recorded):
    """Rows of a record, by their number."""

    def __init__(self, layout: RecordLayout, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(layout, dtype)
        self.num_embeddings, self.embedding_dim = layout.matrices[0].rows, layout.matrices[0].cols
        self.padding_idx = padding_idx

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """Return the same layer with a matrix [rows, cols] for its record."""
        rows, cols = weight.shape
        return nn.Embedding(rows, cols, self.padding_idx, _weight=weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids [...]; [..., cols] in the model's dtype."""
        blocks = [self._unpacked(rows) for rows in self._blocks(ids.reshape(-1))]
        found = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return found.view(*ids.shape, self.embedding_dim)


def unpack_onto(model: nn.Module, device: torch.device) -> None:
    """Put plain layers on a device in the place of all that are records, one after the other.

    A GPU multiplies 16-bit weights faster than it would unpack them. Of records that are one and
    the same, so are the weights.
    """
    unpacked: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if not isinstance(child, _Recorded) or child.record is None:
                continue
            place = child.record.data_ptr()
            if place not in unpacked:
                weight = child.weight.to(device)
                unpacked[place] = nn.Parameter(weight, requires_grad=False)
            parent._modules[name] = child.plain(unpacked[place])


def use_native(model: nn.Module, wanted: bool) -> None:
    """Let every linear layer of a model that is a record compute natively, or by torch.

    Raises:
        NativeUnavailable: it shall, and there is no native core.
    """
    if wanted:
        native.core().set_threads(torch.get_num_threads())
    for module in model.modules():
        if isinstance(module, RecordLinear):
            module.native = wanted


def is_native(model: nn.Module) -> bool:
    """Say whether a model has linear layers that compute natively from records."""
    return any(isinstance(module, RecordLinear) and module.native for module in model.modules())
