"""How are the weights of a GGUF read without loading it?

One expert or one run of rows at a time, by position, dequantized by gguf's own code. The tensors
have the names and shapes of the transformers model's parameters (`gguf_names`), their dtypes are
those that hold every value: float32 unless the file has 16-bit floats.

Types whose values lie on a uniform grid also hand out that grid, so that a record can keep it.
Source: gguf 0.19, quants.py; llama.cpp 0c1e57098, ggml/src/ggml-common.h (the blocks).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from fate_moe.models.gguf_metadata import Gguf
from fate_moe.models.gguf_names import Recipe
from fate_moe.models.weights import FLOATS
from fate_moe.quant.grid import Grid
from fate_moe.quant.quantize import Quantized
from fate_moe.store.convert import SourceTensor

SUFFIX = ".gguf"
GROUP = 32  # weights that share a scale in every type with a grid

_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MAX_FILES = 4096
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STEP = 1 << 20  # weights dequantized at once: the temporaries are several times as large
_PIECE_BYTES = 8 << 20
# Symmetric types: bits of a code, and with it the zero. Their codes are kept as they are.
_SYMMETRIC = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
# Types with a minimum per group: -min / scale is no fp16 number in general. Bits of a code.
_WITH_MINIMUM = {"Q4_1": 4, "Q4_K": 4, "Q5_1": 5, "Q5_K": 5}


def find_gguf(folder: Path) -> Path | None:
    """Return the one GGUF model of a folder, or None where there is none.

    Raises:
        ModelError: there are several.
    """
    found = []
    for path in sorted(folder.iterdir()):
        match = _SPLIT_NAME.fullmatch(path.name)
        if path.suffix.lower() == SUFFIX and (match is None or int(match.group(2)) == 1):
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:8]) + (", ..." if found[8:] else "")
        raise ModelError(f"{folder}: holds {len(found)} GGUF models, name one of {names}")
    return found[0] if found else None


def open_gguf(path: Path) -> Gguf:
    """Read the headers of a model: one file, or all of a split one.

    Args:
        path: a GGUF file; of a split model any of its files.
    Raises:
        ModelError: a file of a split model is missing.
        FormatError: a file breaks the format, or two of them have a tensor of one name.
    """
    headers = [read_gguf_header(file) for file in _files(path)]
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        _check_place(header, headers)
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise FormatError(f"{header.path}: tensor {name!r} is also in another file")
            tensors[name] = tensor
    digests = {header.path.name: header.digest for header in headers}
    return Gguf(headers[0], tensors, digests)


class GgufWeights:
    """The `Weights` of a GGUF model, with its own grids where it has some.

    Args:
        gguf: the checked headers.
        recipes: parameter name -> how it is put together.
    Raises:
        ModelError: a tensor is of a type that gguf cannot dequantize.
    """

    def __init__(self, gguf: Gguf, recipes: Mapping[str, Recipe]) -> None:
        self._gguf = gguf
        self._recipes = recipes
        self._open_files: dict[Path, int] = {}
        self._lock = Lock()  # of the open files: experts may be read side by side
        self.tensors = {
            name: SourceTensor(name, self._dtype(recipe), recipe.shape)
            for name, recipe in recipes.items()
        }
        self.digests: Mapping[str, str] = gguf.digests
        types = {name: sorted({s.type for s in self._sources(name)}) for name in recipes}
        self.packings = {
            name: "+".join(found) for name, found in types.items() if not set(found) <= set(_PLAIN)
        }

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for descriptor in self._open_files.values():
            os.close(descriptor)
        self._open_files.clear()

    def where(self, name: str) -> Path:
        """Name the file that a tensor lies in, or its first part."""
        return self._sources(name)[0].path

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """Read a tensor as floats, or the part `expert` of its first dimension.

        Raises:
            FormatError: a file ends too early or cannot be read.
        """
        recipe = self._recipes[name]
        if recipe.is_fused and expert is None:
            return torch.stack([self.load(name, e) for e in range(recipe.shape[0])])
        dtype = FLOATS[self.tensors[name].dtype]
        parts = [self._floats(source, expert).to(dtype) for source in self._sources(name)]
        out = recipe.arrange(parts)
        return out.mT if recipe.is_transposed else out

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces of at most 8 MiB.

        A tensor whose rows are out of order is in memory as a whole, which no expert is.

        Raises:
            FormatError: as `load`.
        """
        recipe = self._recipes[name]
        source = self._sources(name)[0]
        parts = self._runs(source) if recipe.is_plain else iter([self.load(name)])
        for part in parts:
            data = memoryview(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(data), _PIECE_BYTES):
                yield data[start : start + _PIECE_BYTES]

    def has_codes(self, name: str, bits: int) -> bool:
        """Whether all of a tensor is codes of at most `bits` on a grid that fp16 can express."""
        types = {source.type for source in self._sources(name)}
        return all(_SYMMETRIC.get(type_, 99) <= bits for type_ in types)

    def has_grid(self, name: str, bits: int) -> bool:
        """Whether all of a tensor lies on grids of at most `bits`, if not ones that fp16 has."""
        known = _SYMMETRIC | _WITH_MINIMUM
        types = {source.type for source in self._sources(name)}
        return all(known.get(type_, 99) <= bits for type_ in types)

    def codes(self, name: str, expert: int) -> Quantized:
        """Read the codes of one expert's matrix [out, in], where `has_codes`."""
        recipe = self._recipes[name]
        parts = [
            _codes(source.type, self._blocks(source, expert)) for source in self._sources(name)
        ]
        return Quantized(*(recipe.arrange(list(fields)) for fields in zip(*parts, strict=True)))

    def grid(self, name: str, expert: int) -> Grid:
        """Read scales and zeros, float32 [out, in / 32], of one expert, where `has_grid`."""
        recipe = self._recipes[name]
        parts = [_grid(source.type, self._blocks(source, expert)) for source in self._sources(name)]
        return Grid(*(recipe.arrange(list(fields)) for fields in zip(*parts, strict=True)))

    def _sources(self, name: str) -> list[GgufTensor]:
        return [self._gguf.tensors[source] for source in self._recipes[name].sources]

    def _dtype(self, recipe: Recipe) -> str:
        types = set()
        for source in (self._gguf.tensors[name] for name in recipe.sources):
            if source.type not in _PLAIN and not _can_dequantize(source.type):
                raise ModelError(
                    f"{source.path}: tensor {source.name} is {source.type}, which gguf cannot "
                    "dequantize"
                )
            types.add(source.type if source.type in _PLAIN else "F32")
        return types.pop() if len(types) == 1 else "F32"

    def _runs(self, source: GgufTensor) -> Iterator[Tensor]:
        """Read a tensor as floats, a run of rows at a time."""
        row = source.shape[-1]
        rows = source.nbytes // _row_bytes(source)
        step = max(1, _STEP // row)
        for start in range(0, rows, step):
            yield self._rows(source, start, min(step, rows - start))

    def _floats(self, source: GgufTensor, expert: int | None) -> Tensor:
        shape = source.shape if expert is None else source.shape[1:]
        row = shape[-1]
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        first = 0 if expert is None else expert * rows
        out = torch.empty(rows, row, dtype=_PLAIN.get(source.type, torch.float32))
        step = max(1, _STEP // row)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            out[start : start + count] = self._rows(source, first + start, count)
        return out.view(shape)

    def _rows(self, source: GgufTensor, first: int, count: int) -> Tensor:
        data = self._bytes(source, first, count)
        dtype = _PLAIN.get(source.type)
        if dtype is not None:
            return torch.from_numpy(data).view(dtype)
        with np.errstate(all="ignore"):  # damaged scales: found by whoever quantizes
            floats = quants.dequantize(data, GGMLQuantizationType[source.type])
        return torch.from_numpy(np.ascontiguousarray(floats, dtype=np.float32))

    def _blocks(self, source: GgufTensor, expert: int) -> np.ndarray:
        """Read one expert's blocks: uint8 [rows, blocks, block bytes]."""
        rows = source.shape[1]
        data = self._bytes(source, expert * rows, rows)
        block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[source.type]][1]
        return data.reshape(rows, -1, block_bytes)

    def _bytes(self, source: GgufTensor, first: int, count: int) -> np.ndarray:
        """Read rows: uint8 [count, row bytes]."""
        size = _row_bytes(source)
        data = np.empty((count, size), dtype=np.uint8)
        self._read_into(source, source.offset + first * size, data.data.cast("B"))
        return data

    def _read_into(self, source: GgufTensor, offset: int, target: memoryview) -> None:
        path, done = source.path, 0
        try:
            with self._lock:
                descriptor = self._open_files.get(path)
                if descriptor is None:
                    descriptor = self._open_files[path] = os.open(path, os.O_RDONLY)
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if not count:
                    raise FormatError(
                        f"{path}: ends at {offset + done}, in tensor {source.name}; it changed "
                        "while we read"
                    )
                done += count
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def _row_bytes(source: GgufTensor) -> int:
    block: int
    block_bytes: int
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[source.type]]
    return source.shape[-1] // block * block_bytes


def _can_dequantize(type_: str) -> bool:
    try:
        block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_]][1]
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), GGMLQuantizationType[type_])
    except NotImplementedError:
        return False
    return True


def _codes(type_: str, blocks: np.ndarray) -> Quantized:
    """Take symmetric blocks apart: codes uint8 [rows, cols], scales and zeros fp16."""
    rows = len(blocks)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if type_ == "Q8_0":
        codes = blocks[..., 2:] ^ 0x80  # signed bytes, counted from -128
    else:
        packed = blocks[..., -GROUP // 2 :]
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
        if type_ == "Q5_0":
            fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
            codes |= fifth << 4
    zero = np.full_like(scale, 1 << (_SYMMETRIC[type_] - 1))
    return Quantized(*map(torch.from_numpy, (codes.reshape(rows, -1), scale, zero)))


def _grid(type_: str, blocks: np.ndarray) -> Grid:
    """Compute each group's scale and zero, float32 [rows, groups]."""
    if type_ in _SYMMETRIC:
        found = _codes(type_, blocks)
        return Grid(found.scale.float(), found.zero.float())
    rows = len(blocks)
    halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    scale, minimum = halves[..., :1], -halves[..., 1:]
    if type_.endswith("_K"):  # eight groups, their scales and minima in six bits
        steps, least = quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
        scale = scale * steps.reshape(rows, -1, 8)
        minimum = -minimum * least.reshape(rows, -1, 8)
    with np.errstate(all="ignore"):  # a scale of 0: the grid is a point, and never the best
        zero = minimum / scale
    return Grid(*(torch.from_numpy(part.reshape(rows, -1)) for part in (scale, zero)))


def _files(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    if not 1 <= int(count) <= _MAX_FILES:
        raise ModelError(f"{path}: of {int(count)} files, the limit is {_MAX_FILES}")
    names = [f"{stem}-{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            raise ModelError(f"{path.parent / name}: file is missing; is the download complete?")
    return [path.parent / name for name in names]


def _check_place(header: GgufHeader, headers: list[GgufHeader]) -> None:
    """A file of a split model says which one it is."""
    count = header.metadata.get("split.count", 0) or 1
    if count != len(headers):
        raise ModelError(
            f"{header.path}: is one of {count!r:.20} files, found {len(headers)}; they must lie in "
            "one folder as NAME-00001-of-0000N.gguf"
        )
    place = header.metadata.get("split.no", 0)
    if headers[place if type(place) is int and 0 <= place < count else -1] is not header:
        raise FormatError(f"{header.path}: says that it is file {place!r:.20} of {count}")
