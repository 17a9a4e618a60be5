"""Which matrices besides the experts' are records, and how do they get into a model?

A store says it itself: `resident.safetensors` holds `P.record` where a plain one has `P.weight`.
Where the native core computes in float32 beside experts in codes, a plain one of bfloat16 is taken
as it is for a record, too: widened for good it would take twice the memory, and twice the time to
read it for each token.
The family's class is built as ever, on the meta device; then the layers that have a record are put
in the place of the plain ones, and transformers loads what is left. Records are read past it, each
byte once, into one allocation: at no time is a matrix in memory as floats, or twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fate_moe.errors import FormatError, ModelError
from fate_moe.memory import Arena
from fate_moe.models.quantized import RecordEmbedding, RecordLinear
from fate_moe.models.seam import find_experts
from fate_moe.quant.record import (
    GROUPS,
    MAX_DIM,
    RECORD_ALIGN,
    SECTION_ALIGN,
    MatrixSpec,
    RecordLayout,
    choose_group,
    round_up,
)
from fate_moe.store.format import RESIDENT_FILE, Manifest, read_manifest
from fate_moe.store.header import Header, TensorEntry, read_header

RESIDENT_BITS = (4, 8, 16)
"""Of matrices besides the experts': codes of 4 or 8 bits, or as they are in the checkpoint."""

LEAST_WEIGHTS = 1 << 16
_LEAST_ROWS = 32
_SUFFIX = ".record"


def worth_codes(skeleton: nn.Module, least_weights: int = LEAST_WEIGHTS) -> dict[str, MatrixSpec]:
    """Name the matrices besides the experts' that are large enough to be codes.

    Plain linear layers and embeddings, no subclasses of them, whose forward may do more. Not the
    routers: they are small, and all that follows hangs on them. Not what the family keeps in
    float32. Of matrices that are one and the same (tied), all or none.

    Args:
        skeleton: the model on the meta device.
        least_weights: fewer stay as they are.
    Returns:
        Module path -> matrix, in model order.
    """
    experts = tuple(f"{path}." for path in find_experts(skeleton))
    owners: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found = {
        path: _matrix(path, module)
        for path, module in skeleton.named_modules(remove_duplicate=False)
        if _is_plain(module)
        and not path.startswith(experts)
        and not {"gate", "router"} & set(path.split("."))
        and not any(part in f"{path}.weight" for part in _kept_wide(skeleton))
        and _is_large(module, least_weights)
    }
    return {
        path: matrix
        for path, matrix in found.items()
        if all(
            owner.removesuffix(".weight") in found
            for owner in owners[id(skeleton.get_submodule(path).weight)]
        )
    }


def resident_bits(manifest: Manifest) -> int:
    """Return the bits of a store's matrices besides the experts'.

    Raises:
        FormatError: the manifest names others than there are.
    """
    bits = manifest.quantization.get("resident_bits", 16)
    if type(bits) is not int or bits not in RESIDENT_BITS:
        raise FormatError(
            f"fate.json: quantization: resident_bits is {bits!r:.40}, must be one of "
            f"{RESIDENT_BITS}"
        )
    return bits


def record_name(path: str) -> str:
    """Name the tensor that is the record of a module."""
    return path + _SUFFIX


def is_record(name: str) -> bool:
    """Say whether a tensor of a store is a record."""
    return name.endswith(_SUFFIX)


def record_shapes(header: Header, skeleton: nn.Module) -> list[tuple[int, ...]]:
    """Return the shape [out, in] of each matrix that is a record.

    Raises:
        FormatError: a record is no matrix of the model.
    """
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    paths = [name.removesuffix(_SUFFIX) for name in header.tensors if is_record(name)]
    return [tuple(_recordable(modules, path).weight.shape) for path in paths]


@dataclass(frozen=True)
class Records:
    """The records of a store's matrices besides the experts', and what is taken for such.

    Attributes:
        file: where they lie.
        entries: module path -> the tensor in the file.
        layouts: module path -> its layout.
        tied: module path without a record of its own -> the path whose record it shares.
        names: of the file's tensors that are read, or left out, for all this.
    """

    file: Path
    entries: Mapping[str, TensorEntry]
    layouts: Mapping[str, RecordLayout]
    tied: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def model_class(self, cls: type[nn.Module], dtype: torch.dtype) -> Any:
        """Derive a family's class that has layers with records where the store has them."""
        if not self.entries:
            return cls
        records = self

        class WithRecords(cls):  # type: ignore[valid-type,misc]
            def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
                super().__init__(config, *args, **kwargs)
                records._put_into(self, dtype)

        # transformers goes by these to know its own classes.
        WithRecords.__name__, WithRecords.__qualname__ = cls.__name__, cls.__qualname__
        WithRecords.__module__ = cls.__module__
        return WithRecords

    def load_into(self, model: nn.Module) -> None:
        """Read all records, each into a part of one allocation.

        Raises:
            FormatError: the file ends too early or cannot be read.
        """
        if not self.entries:
            return
        sizes = [round_up(entry.nbytes, SECTION_ALIGN) for entry in self.entries.values()]
        arena = Arena(1, round_up(sum(sizes), RECORD_ALIGN))
        memory, view, start = arena.tensor(0), arena.view(0), 0
        try:
            with self.file.open("rb", buffering=0) as file:
                for (path, entry), size in zip(self.entries.items(), sizes, strict=True):
                    file.seek(entry.offset)
                    self._read(file, view[start : start + entry.nbytes])
                    module: Any = model.get_submodule(path)
                    module.record = memory[start : start + entry.nbytes]
                    start += size
        except OSError as error:
            raise FormatError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        for path, source in self.tied.items():
            module = model.get_submodule(path)
            module.record = model.get_submodule(source).record

    def _read(self, file: Any, view: memoryview) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise FormatError(f"{self.file}: ends too early; convert the model again")
            view = view[count:]

    def _put_into(self, model: Any, dtype: torch.dtype) -> None:
        paths = dict(self.layouts)
        paths |= {path: self.layouts[source] for path, source in self.tied.items()}
        made = {
            id(module): _with_record(module, layout, dtype)
            for path, layout in paths.items()
            for module in [model.get_submodule(path)]
        }
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = made.get(id(child), child)
        # Ties of records are ours; transformers would look for weights to tie.
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if not {target.removesuffix(".weight"), source.removesuffix(".weight")} & set(paths)
        }


def kept_narrow(header: Header, skeleton: nn.Module) -> dict[str, TensorEntry]:
    """Name the plain matrices of a store that may stay in bfloat16: those that are worth codes.

    Not what the file calls otherwise than the model does, what is tied though the file holds both,
    which transformers decides on, nor what the family's own code looks at.

    Returns:
        Module path -> the tensor in the file.
    """
    found: dict[int, list[tuple[str, TensorEntry]]] = {}
    for path, matrix in worth_codes(skeleton).items():
        entry = header.tensors.get(f"{path}.weight")
        if entry and entry.dtype == "BF16" and entry.shape == (matrix.rows, matrix.cols):
            found.setdefault(id(skeleton.get_submodule(path).weight), []).append((path, entry))
    return {
        path: entry
        for (path, entry), *others in found.values()
        if not others and not _is_looked_at(skeleton, path)
    }


def _is_looked_at(skeleton: nn.Module, path: str) -> bool:
    """Say whether the code around a layer names its weights: each look would widen them."""
    parent, _, name = path.rpartition(".")
    family: Any = type(skeleton.get_submodule(parent))
    return f"self.{name}.weight" in _source_of(family)


@cache
def _source_of(cls: type) -> str:
    try:
        return getsource(cls)
    except (OSError, TypeError):  # installed without
        return ""


def find_records(folder: Path, skeleton: nn.Module, narrow: bool = False) -> Records:
    """Look up the records in a store.

    Args:
        skeleton: the model on the meta device.
        narrow: plain matrices of bfloat16 are records, too.
    Raises:
        FormatError: a record fits no matrix of the model; nothing is read of it.
    """
    file = folder / RESIDENT_FILE
    header = read_header(file)
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    coded = _coded(folder, header, modules)
    plain = kept_narrow(header, skeleton) if narrow else {}
    entries = {path: header.tensors[record_name(path)] for path in coded} | plain
    layouts = coded | {path: _layout_as_it_is(entry) for path, entry in plain.items()}
    tied = _tied(modules, layouts)
    names = {entry.name for entry in entries.values()} | {f"{path}.weight" for path in tied}
    return Records(file, entries, layouts, tied, frozenset(names))


def _layout_as_it_is(entry: TensorEntry) -> RecordLayout:
    rows, cols = entry.shape
    return RecordLayout((MatrixSpec("weight", rows, cols, 0),), bits=16, dtype="bfloat16")


def _coded(folder: Path, header: Header, modules: Mapping[str, Any]) -> dict[str, RecordLayout]:
    file = folder / RESIDENT_FILE
    entries = {
        name.removesuffix(_SUFFIX): entry
        for name, entry in header.tensors.items()
        if is_record(name)
    }
    bits = resident_bits(read_manifest(folder)) if entries else 16
    if entries and bits == 16:
        raise FormatError(f"{file}: holds records, fate.json says that there are none")
    layouts = {}
    for path, entry in entries.items():
        layout = resident_layout(_matrix(path, _recordable(modules, path)), bits)
        if entry.dtype != "U8" or entry.shape != (layout.record_bytes,):
            raise FormatError(
                f"{file}: {entry.name} is {entry.dtype} {entry.shape}, need U8 "
                f"({layout.record_bytes},); convert the model again"
            )
        layouts[path] = layout
    return layouts


def resident_layout(matrix: MatrixSpec, bits: int) -> RecordLayout:
    """Lay out a matrix that is no expert's."""
    return RecordLayout((matrix,), bits=bits)


def _tied(modules: Mapping[str, Any], layouts: Mapping[str, RecordLayout]) -> dict[str, str]:
    sources = {id(modules[path].weight): path for path in layouts}
    return {
        path: sources[id(module.weight)]
        for path, module in modules.items()
        if _is_plain(module) and path not in layouts and id(module.weight) in sources
    }


def _recordable(modules: Mapping[str, Any], path: str) -> Any:
    module = modules.get(path)
    if module is None or not _is_plain(module):
        raise FormatError(
            f"{RESIDENT_FILE}: {record_name(path)} is no matrix of the model; convert it again"
        )
    return module


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding)


def _is_large(module: Any, least_weights: int) -> bool:
    rows, cols = map(int, module.weight.shape)
    return (
        _LEAST_ROWS <= rows <= MAX_DIM
        and 0 < cols <= MAX_DIM
        and cols % GROUPS[-1] == 0
        and rows * cols >= least_weights
    )


def _kept_wide(skeleton: Any) -> list[str]:
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [part for name in names for part in getattr(skeleton, name, None) or ()]


def _matrix(path: str, module: Any) -> MatrixSpec:
    rows, cols = module.weight.shape
    try:
        return MatrixSpec("weight", rows, cols, choose_group(path, cols))
    except ModelError as error:
        raise FormatError(str(error)) from error


def _with_record(module: Any, layout: RecordLayout, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return RecordEmbedding(layout, module.padding_idx, dtype)
    return RecordLinear(layout, module.bias, dtype)
