"""Which safetensors files make up a checkpoint, and how is a piece of one tensor read?

Reads by position, never by mapping: a file that is cut short under us is an error message and not
a SIGBUS. Knows no model. Invariants: sizes and headers of all shards are checked before a tensor
is read; a key lies in exactly one shard.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.weights import FLOATS
from fate_moe.store.convert import SourceTensor
from fate_moe.store.header import Header, TensorEntry, load_json, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 1 << 27
_MAX_NAME = 1024

_PIECE_BYTES = 8 << 20
_PACKED = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}\.safetensors")


@dataclass(frozen=True, slots=True)
class _Located:
    """One checkpoint tensor and the file it lies in."""

    path: Path
    entry: TensorEntry


class Shards:
    """The `Weights` of a folder: one `model.safetensors`, or an index and its shards.

    Raises:
        ModelError: there are no safetensors, or a shard or a tensor of the index is missing.
        FormatError: a file breaks its format.
    """

    def __init__(self, folder: Path) -> None:
        self._located: dict[str, _Located] = {}
        self.tensors: dict[str, SourceTensor] = {}
        self.digests: dict[str, str] = {}
        self._open_files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()  # one opens a file; one seeks, where preadv is missing
        names = (name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file())
        promised = _weight_map(folder, frozenset(names))
        for name in sorted(set(promised.values())):
            self._add(folder / name)
        for key, name in promised.items():
            if key and (key not in self.tensors or self._located[key].path.name != name):
                raise ModelError(f"{folder / name}: tensor {key[:200]!r} of the index is missing")

    @property
    def packings(self) -> Mapping[str, str]:
        """Nothing: `packed` unpacks what these files hold packed."""
        return {}

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        for file in self._open_files.values():
            file.close()
        self._open_files.clear()

    def where(self, name: str) -> Path:
        """Name the file that a tensor lies in."""
        return self._located[name].path

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """Read a float tensor, or the part `expert` of its first dimension.

        Raises:
            ModelError: the tensor is not bf16, fp16 or fp32.
            FormatError: the file ends too early.
        """
        found = self._located[name]
        entry, shape, offset = found.entry, found.entry.shape, found.entry.offset
        dtype = FLOATS.get(entry.dtype)
        if dtype is None:
            raise ModelError(f"{found.path}: {name} is {entry.dtype}, need one of {list(FLOATS)}")
        size = entry.nbytes
        if expert is not None:
            size //= shape[0]
            offset += expert * size
            shape = shape[1:]
        data = bytearray(size)
        self._read_into(found.path, offset, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of any dtype in pieces of at most 8 MiB.

        Raises:
            FormatError: the file ends too early.
        """
        found = self._located[name]
        offset, left = found.entry.offset, found.entry.nbytes
        buffer = memoryview(bytearray(min(left, _PIECE_BYTES)))
        while left:
            piece = buffer[: min(left, _PIECE_BYTES)]
            self._read_into(found.path, offset, piece)
            yield piece
            offset += len(piece)
            left -= len(piece)

    def values(self, name: str, start: int, count: int) -> Tensor:
        """Read `count` values from number `start` on, in the order and dtype they are stored in.

        Args:
            name: a tensor of floats, of packed floats or of bytes.
        Returns:
            Shape [count].
        Raises:
            FormatError: the file ends too early.
        """
        found = self._located[name]
        dtype = (FLOATS | _PACKED)[found.entry.dtype]
        data = bytearray(count * dtype.itemsize)
        self._read_into(found.path, found.entry.offset + start * dtype.itemsize, memoryview(data))
        return torch.frombuffer(data, dtype=dtype)

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"{path}: shard is missing; is the download complete?")
        header = read_header(path)
        self.digests[path.name] = _fingerprint(path, header)
        for name, entry in header.tensors.items():
            if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
                raise FormatError(f"{path}: tensor {name[:80]!r} has a name that is no name")
            if name in self.tensors:
                raise FormatError(f"{path}: tensor {name!r:.200} is also in another shard")
            self._located[name] = _Located(path, entry)
            self.tensors[name] = SourceTensor(name, entry.dtype, entry.shape)

    def _read_into(self, path: Path, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset`; any thread may call it."""
        try:
            with self._lock:
                file = self._open_files.get(path)
                if file is None:
                    file = self._open_files[path] = path.open("rb", buffering=0)
            done = 0
            while done < len(target):
                count = self._read_some(file, offset + done, target[done:])
                if not count:
                    raise FormatError(f"{path}: ends at {offset + done}; it changed while we read")
                done += count
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _read_some(self, file: BinaryIO, offset: int, target: memoryview) -> int:
        preadv = getattr(os, "preadv", None)  # missing on Windows
        if preadv is not None:
            return int(preadv(file.fileno(), [target], offset))
        with self._lock:
            file.seek(offset)
            return int(file.readinto(target))  # type: ignore[attr-defined]


def promised_files(folder: Path, published: Container[str]) -> tuple[str, ...]:
    """Name the safetensors of a checkpoint of which no weights are here yet.

    Args:
        folder: holds the index, if there is one.
        published: names of the files that the whole checkpoint has.
    Raises:
        ModelError: it has no safetensors.
        FormatError: the index breaks its format.
    """
    return tuple(sorted(set(_weight_map(folder, published).values())))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object of bounded size from an untrusted file.

    Raises:
        ModelError: the file is missing.
        FormatError: it is no JSON object, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    fields = load_json(data, str(path))
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: not a JSON object")
    return fields


def _fingerprint(path: Path, header: Header) -> str:
    # Size and header are the same for two trainings of one model; the time of writing is not.
    # Hashing every byte would take as long as the conversion.
    written = f"{header.digest} {path.stat().st_mtime_ns}"
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def _weight_map(folder: Path, published: Container[str]) -> Mapping[str, str]:
    """Tensor name -> shard file name; the empty name stands for "all of it".

    Where both are published, the single file is the checkpoint and the index is left over; so
    transformers has it, modeling_utils.py.
    """
    if SINGLE_FILE in published:
        return {"": SINGLE_FILE}
    if INDEX_FILE not in published:
        raise ModelError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
        )
    return _read_index(folder / INDEX_FILE)


def _read_index(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map must be an object with entries")
    for name in weight_map.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise FormatError(f"{index}: weight_map names {name!r:.80}, no plain safetensors file")
    return weight_map
