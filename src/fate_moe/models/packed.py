"""Which values do the packed tensors of an FP8 or MXFP4 checkpoint stand for?

Packed tensors are shown as bfloat16, under the name and in the shape that the family's plain
checkpoints have; their scales are hidden. The values are those of transformers' dequantization,
bit for bit, save that blocks at a ragged edge keep the size that the config states (transformers
refuses or stretches them). Invariants: dtypes and shapes of all packed tensors and scales are
checked before a weight is read; one matrix and a band of its rows at a time are in memory.
Source: transformers 5.23, integrations/finegrained_fp8.py and mxfp4.py; DeepSeek-V3's
inference/kernel.py (block edges); OCP Microscaling Formats 1.0 (E2M1, E8M0).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.shards import Shards
from fate_moe.models.weights import Weights
from fate_moe.store.convert import SourceTensor

METHODS = ("fp8", "mxfp4")
DEFAULT_BLOCK = [128, 128]  # of a config with quant_method fp8 that names none

_BAND = 1 << 20  # weights that are unpacked at a time
_PIECE_BYTES = 8 << 20
_MAX_BLOCK = 1 << 20
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_LANE = 32  # MXFP4 weights that share one scale, in 16 bytes
_NO_EXPONENT = 255  # E8M0's only code that is no number


class _Packing(Protocol):
    """Matrices of one packed tensor: `count` times [rows, cols] as they are stored."""

    kind: str
    stored: str  # the tensor that holds the codes
    hidden: tuple[str, ...]  # stored tensors that are part of this one, or of no use without it
    shape: tuple[int, ...]  # as shown
    is_flipped: bool  # shown as [cols, rows]
    count: int
    rows: int
    cols: int

    def band(self, shards: Shards, matrix: int, first: int, last: int) -> Tensor:
        """Unpack rows first..last of a matrix; float32 [last - first, cols]."""
        ...


def unpack(shards: Shards, folder: Path, quantization: object) -> Weights:
    """Show a checkpoint's weights as plain floats.

    Args:
        shards: its files.
        folder: for messages.
        quantization: `quantization_config` of its config.json, untrusted; None: there is none.
    Raises:
        ModelError: another method than fp8 and mxfp4, or a packed tensor or scale is missing.
        FormatError: a scale or a packed tensor has the wrong dtype or shape.
    """
    found: list[_Packing] = []
    method = check_method(folder, quantization)
    if method == "fp8" and isinstance(quantization, dict):
        found = _find_fp8(shards, _block(folder, quantization))
    elif method == "mxfp4":
        found = _find_mxfp4(shards)
    packed = Packed(shards, found)
    for name, tensor in packed.tensors.items():
        if tensor.dtype.startswith("F8_"):
            raise ModelError(
                f"{_at(shards, name)} is {tensor.dtype} without a scale that "
                "quantization_config explains; the checkpoint is incomplete"
            )
    return packed if found else shards


def check_method(folder: Path, quantization: object) -> str | None:
    """Return the method of a config's `quantization_config`; None where it is None.

    Raises:
        ModelError: another method than fp8 and mxfp4.
    """
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in METHODS:
        raise ModelError(
            f"{folder}: the checkpoint is already quantized ({method or 'unknown'!s:.40}): "
            f"only {' and '.join(METHODS)} are read; use one of these, or the bf16 checkpoint"
        )
    return str(method)


def plain_config(data: bytes) -> bytes:
    """Rewrite a config.json for weights that are no longer packed; any other stays as it is."""
    fields = json.loads(data)
    if not any("quantization_config" in part for part in _parts(fields)):
        return data
    for part in _parts(fields):
        part.pop("quantization_config", None)
    if "dtype" not in fields and "torch_dtype" not in fields:
        fields["dtype"] = "bfloat16"  # transformers asks the weights then; ours are in other files
    return (json.dumps(fields, indent=2) + "\n").encode()


class Packed:
    """The `Weights` of shards in which some tensors are packed."""

    def __init__(self, shards: Shards, packings: list[_Packing]) -> None:
        self._shards = shards
        self._packings: dict[str, _Packing] = {}
        hidden = {name for packing in packings for name in (packing.stored, *packing.hidden)}
        plain = {name: t for name, t in shards.tensors.items() if name not in hidden}
        self.tensors: dict[str, SourceTensor] = plain
        for packing in packings:
            name = packing.stored.removesuffix("_blocks") if packing.is_flipped else packing.stored
            if name in self.tensors:
                raise FormatError(f"{_at(shards, name)} is there twice, plain and packed")
            self.tensors[name] = SourceTensor(name, "BF16", packing.shape)
            self._packings[name] = packing

    @property
    def digests(self) -> Mapping[str, str]:
        """File name -> fingerprint."""
        return self._shards.digests

    @property
    def packings(self) -> Mapping[str, str]:
        """Name of a packed tensor -> "FP8" or "MXFP4"."""
        return {name: packing.kind for name, packing in self._packings.items()}

    def where(self, name: str) -> Path:
        """Name the file that a tensor, or its codes, lies in."""
        packing = self._packings.get(name)
        return self._shards.where(packing.stored if packing else name)

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """Read a float tensor, or the part `expert` of its first dimension; bfloat16 if packed.

        Raises:
            ModelError: the tensor holds no floats, or packed values that are NaN or infinite.
            FormatError: a scale is no number, or a file ends too early.
        """
        packing = self._packings.get(name)
        if packing is None:
            return self._shards.load(name, expert)
        if expert is not None and len(packing.shape) == 3:
            return self._matrix(packing, expert)
        whole = torch.stack([self._matrix(packing, i) for i in range(packing.count)])
        whole = whole.view(packing.shape)
        return whole if expert is None else whole[expert]

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, unpacked, in pieces of at most 8 MiB.

        Raises: as `load`.
        """
        packing = self._packings.get(name)
        if packing is None:
            yield from self._shards.pieces(name)
            return
        for matrix in range(packing.count):
            whole = [self._matrix(packing, matrix)] if packing.is_flipped else None
            for band in whole or self._bands(packing, matrix):
                data = band.contiguous().view(torch.uint8).view(-1).numpy().data
                for start in range(0, len(data), _PIECE_BYTES):
                    yield data[start : start + _PIECE_BYTES]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._shards.close()

    def _matrix(self, packing: _Packing, matrix: int) -> Tensor:
        rows = torch.empty(packing.rows, packing.cols, dtype=torch.bfloat16)
        done = 0
        for band in self._bands(packing, matrix):
            rows[done : done + len(band)] = band
            done += len(band)
        return rows.mT if packing.is_flipped else rows

    def _bands(self, packing: _Packing, matrix: int) -> Iterator[Tensor]:
        step = max(1, _BAND // packing.cols)
        for first in range(0, packing.rows, step):
            last = min(first + step, packing.rows)
            band = packing.band(self._shards, matrix, first, last).to(torch.bfloat16)
            if not torch.isfinite(band).all():
                part = f", part {matrix}" if packing.count > 1 else ""
                raise ModelError(
                    f"{_at(self._shards, packing.stored)}{part}: holds NaN or infinity"
                )
            yield band


class _Fp8:
    """E4M3 codes [..., rows, cols] and scales that blocks of them are multiplied by."""

    kind = "FP8"
    is_flipped = False

    def __init__(self, shards: Shards, name: str, block: list[int] | None) -> None:
        self.stored, self.shape = name, shards.tensors[name].shape
        where = _at(shards, name)
        if not 2 <= len(self.shape) <= 3 or 0 in self.shape:
            raise FormatError(f"{where} is FP8 of shape {self.shape}, need matrices")
        self.scale = self._find_scale(shards, where)
        stem = name.removesuffix("weight") if name.endswith(".weight") else name + "_"
        used_for_inputs = (f"{stem}{kind}_scale" for kind in ("activation", "input"))
        self.hidden = (self.scale, *(n for n in used_for_inputs if n in shards.tensors))
        *lead, self.rows, self.cols = self.shape
        self.count = math.prod(lead)
        entry = shards.tensors[self.scale]
        if entry.dtype not in _SCALE_DTYPES:
            need = ", ".join(_SCALE_DTYPES)
            raise FormatError(f"{_at(shards, self.scale)} is {entry.dtype}, need one of {need}")
        is_single = entry.shape == tuple(lead) or (entry.shape == (1,) and self.count == 1)
        self.block = block if block and not is_single else [self.rows, self.cols]
        self.grid = [-(-self.rows // self.block[0]), -(-self.cols // self.block[1])]
        if not is_single and entry.shape != (*lead, *self.grid):
            raise FormatError(
                f"{_at(shards, self.scale)} has shape {entry.shape}, "
                f"need {(*lead, *self.grid)}: one per block of {self.block} in {self.shape}"
            )

    def band(self, shards: Shards, matrix: int, first: int, last: int) -> Tensor:
        start = (matrix * self.rows + first) * self.cols
        codes = shards.values(self.stored, start, (last - first) * self.cols).view(-1, self.cols)
        height, width = self.block
        top, bottom = first // height, (last - 1) // height + 1  # the rows of blocks in this band
        at = matrix * math.prod(self.grid) + top * self.grid[1]
        scales = shards.values(self.scale, at, (bottom - top) * self.grid[1])
        scales = scales.float().view(bottom - top, self.grid[1])
        if not torch.isfinite(scales).all():
            raise FormatError(f"{_at(shards, self.scale)} holds NaN or infinity")
        by_row = scales[torch.arange(first, last) // height - top]
        width = min(width, self.cols)  # a block may be far larger than the matrix
        return codes.float().mul_(by_row.repeat_interleave(width, 1)[:, : self.cols])

    def _find_scale(self, shards: Shards, where: str) -> str:
        found = [
            name
            for name in (f"{self.stored}_scale_inv", f"{self.stored}_scale")
            if name in shards.tensors
        ]
        if not found:
            raise ModelError(f"{where} is FP8, and its scale {self.stored}_scale_inv is missing")
        if len(found) > 1:
            raise FormatError(f"{where} has two scales, {found[0]} and {found[1]}")
        return found[0]


class _Mxfp4:
    """E2M1 codes [E, out, in / 32, 16], two to a byte, and E8M0 scales [E, out, in / 32].

    Shown as [E, in, out], which is how gpt-oss keeps its plain matrices.
    """

    kind = "MXFP4"
    is_flipped = True

    def __init__(self, shards: Shards, name: str) -> None:
        self.stored = name
        self.scale = name.removesuffix("_blocks") + "_scales"
        self.hidden: tuple[str, ...] = (self.scale,)
        blocks, scales = shards.tensors[name], shards.tensors.get(self.scale)
        if scales is None:
            raise ModelError(f"{_at(shards, name)}: its scale {self.scale} is missing")
        shape = blocks.shape
        if blocks.dtype != "U8" or len(shape) != 4 or 0 in shape or shape[3] != _LANE // 2:
            raise FormatError(
                f"{_at(shards, name)} is {blocks.dtype} {shape}, need U8 [E, out, in/32, 16]"
            )
        if scales.dtype != "U8" or scales.shape != shape[:3]:
            raise FormatError(
                f"{_at(shards, self.scale)} is {scales.dtype} {scales.shape}, need U8 {shape[:3]}"
            )
        self.count, self.rows, self.groups, _ = shape
        self.cols = self.groups * _LANE
        self.shape: tuple[int, ...] = (self.count, self.cols, self.rows)

    def band(self, shards: Shards, matrix: int, first: int, last: int) -> Tensor:
        start = (matrix * self.rows + first) * self.groups
        groups = (last - first) * self.groups
        codes = shards.values(self.stored, start * _LANE // 2, groups * _LANE // 2)
        exponents = shards.values(self.scale, start, groups)
        if (exponents == _NO_EXPONENT).any():
            raise FormatError(
                f"{_at(shards, self.scale)}, part {matrix}: exponent 255 is no number"
            )
        scales = exponents.view(torch.float8_e8m0fnu).float()
        # The value of the low half of a byte comes first.
        pairs = torch.tensor([[_E2M1[byte & 15], _E2M1[byte >> 4]] for byte in range(256)])
        values = pairs[codes.int()].view(groups, _LANE)
        return values.mul_(scales.view(groups, 1)).view(-1, self.cols)


def _find_fp8(shards: Shards, block: list[int] | None) -> list[_Packing]:
    tensors = shards.tensors
    names = [name for name, tensor in tensors.items() if tensor.dtype == "F8_E4M3"]
    found: list[_Packing] = [_Fp8(shards, name, block) for name in names]
    for name in tensors:
        target = name.removesuffix("_scale_inv")
        have = tensors[target].dtype if target in tensors else "missing"
        if target != name and have != "F8_E4M3":
            raise ModelError(f"{_at(shards, name)} scales {target}, which is {have}, not FP8")
    return found


def _find_mxfp4(shards: Shards) -> list[_Packing]:
    names = [name for name in shards.tensors if name.endswith("_blocks")]
    found: list[_Packing] = [_Mxfp4(shards, name) for name in names]
    for name in shards.tensors:
        target = name.removesuffix("_scales") + "_blocks"
        if name.endswith("_scales") and target not in shards.tensors:
            raise ModelError(f"{_at(shards, name)} scales {target}, which is missing")
    return found


def _block(folder: Path, fields: Mapping[str, object]) -> list[int] | None:
    block = fields.get("weight_block_size", DEFAULT_BLOCK)
    if block is None:
        return None
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _MAX_BLOCK for size in sizes):
        raise FormatError(
            f"{folder / 'config.json'}: weight_block_size is {block!r:.60}, need two sizes"
        )
    return sizes


def _at(shards: Shards, name: str) -> str:
    return f"{shards.where(name)}: {name}"


def _parts(fields: dict[str, object]) -> list[dict[str, object]]:
    """List a config and the configs inside it, such as text_config."""
    return [fields, *(value for value in fields.values() if isinstance(value, dict))]
