"""What does a GGUF header say, and is it sound?

A reader of our own, because the input is not trusted: gguf's reader takes counts and lengths at
their word and makes several objects for each of a vocabulary's tokens.

Format (ggml docs/gguf.md, versions 2 and 3, little-endian): magic, version, tensor count, metadata
count; the metadata, key and typed value; per tensor name, dimensions (the fastest first), type and
offset; padding to the alignment; the data. Invariant: whatever the bytes are, the result is a
header whose tensors lie in the file, apart from each other, or FormatError. No tensor is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fate_moe.errors import FormatError

MAX_HEADER_BYTES = 1 << 28  # a vocabulary of 256 k tokens and its merges are 10 MB
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4

_MAX_KEPT = 1 << 16  # longer arrays are the tokenizer's; only their length matters here
_MAX_ALIGNMENT = 1 << 20
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

Value = int | float | bool | str | tuple[int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its type in ggml's words, its shape in torch's order, and where it lies.

    Attributes:
        type: such as "Q4_K".
        offset: from the start of the file, in bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The checked header of one file.

    Attributes:
        metadata: key -> number, text, or short array of numbers.
        lengths: key -> length, of all other arrays.
        tensors: name -> tensor.
        digest: blake2b-128 of header, file size and time of writing: a cheap fingerprint.
    """

    path: Path
    metadata: Mapping[str, Value]
    lengths: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]
    digest: str


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of one GGUF file.

    Raises:
        FormatError: no such file, or any breach of the format; names the tensor or key.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise FormatError(f"{path}: not a regular file")
            return _read(_Stream(file, info.st_size, path), info.st_mtime_ns)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Stream:
    """Takes a header apart front to back, never beyond its bounds."""

    def __init__(self, file: BinaryIO, file_bytes: int, path: Path) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.position = 0
        self.hash = hashlib.blake2b(b"%d" % file_bytes, digest_size=16)
        self._file = file

    @property
    def left(self) -> int:
        """Bytes that the header may still have."""
        return min(self.file_bytes, MAX_HEADER_BYTES) - self.position

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes."""
        data = self._file.read(count) if 0 <= count <= self.left else b""
        if len(data) < count:
            raise FormatError(
                f"{self.path}: {what} at {self.position} needs {count} bytes, the header has "
                f"{self.left} left; is the download complete?"
            )
        self.position += count
        self.hash.update(data)
        return data

    def number(self, code: str, what: str) -> int:
        """Read one number of a struct format."""
        value: int = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value

    def count(self, most: int, smallest: int, what: str) -> int:
        """Read how many items of at least `smallest` bytes follow."""
        value = self.number("<Q", what)
        if value > min(most, self.left // smallest):
            raise FormatError(
                f"{self.path}: {what} is {value}, {self.left} bytes are left and the limit is "
                f"{most}"
            )
        return value

    def text(self, most: int, what: str) -> str:
        """Read a string."""
        data = self.take(self.count(most, 1, f"length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} is no UTF-8 text") from error

    def skip_texts(self, count: int, what: str) -> None:
        """Walk over strings: those of a vocabulary are too many to go through `text`."""
        read, update, left = self._file.read, self.hash.update, self.left
        for _ in range(count):
            size = read(8)
            left -= 8 + int.from_bytes(size, "little")
            if left < 0:
                raise FormatError(
                    f"{self.path}: {what} does not fit the header; is the download complete?"
                )
            update(size + read(int.from_bytes(size, "little")))
        self.position += self.left - left

    def name(self, what: str) -> str:
        """Read a key or a tensor's name."""
        text = self.text(MAX_NAME_BYTES, what)
        if not text or not text.isprintable():
            raise FormatError(f"{self.path}: {what} is {text!r:.80}")
        return text


def _read(stream: _Stream, written_ns: int) -> GgufHeader:
    path = stream.path
    magic = stream.take(4, "magic")
    if magic != b"GGUF":
        raise FormatError(f"{path}: starts with {magic!r}, no GGUF file")
    version = stream.number("<I", "version")
    if version not in _VERSIONS:
        raise FormatError(f"{path}: GGUF version {version}, this version of Fate reads {_VERSIONS}")
    tensor_count = stream.count(MAX_TENSORS, 24, "number of tensors")
    metadata_count = stream.count(MAX_METADATA, 13, "number of metadata keys")
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(metadata_count):
        key = stream.name("metadata key")
        if key in metadata or key in lengths:
            raise FormatError(f"{path}: metadata key {key!r} appears twice")
        value = _value(stream, key)
        if isinstance(value, _Length):
            lengths[key] = value.count
        else:
            metadata[key] = value
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= _MAX_ALIGNMENT
        or alignment.bit_count() > 1
    ):
        raise FormatError(f"{path}: general.alignment is {alignment!r:.40}, no power of two")
    entries = [_entry(stream, alignment) for _ in range(tensor_count)]
    start = -(-stream.position // alignment) * alignment
    tensors = _placed(entries, start, stream)
    stream.hash.update(b"%d" % written_ns)
    return GgufHeader(path, metadata, lengths, tensors, stream.hash.hexdigest())


@dataclass(frozen=True, slots=True)
class _Length:
    """An array that was walked and not kept."""

    count: int


def _value(stream: _Stream, key: str) -> Value | _Length:
    what = f"value of {key!r}"
    kind = stream.number("<I", what)
    if kind == _STRING:
        return stream.text(MAX_HEADER_BYTES, what)
    if kind != _ARRAY:
        return _scalar(stream, kind, what)
    kind = stream.number("<I", what)
    if kind == _STRING:
        count = stream.count(MAX_HEADER_BYTES, 8, f"length of {key!r}")
        stream.skip_texts(count, what)
        return _Length(count)
    if kind not in _SCALARS:
        raise FormatError(f"{stream.path}: {key!r} is an array of type {kind}, which is unknown")
    size = struct.calcsize(_SCALARS[kind])
    count = stream.count(MAX_HEADER_BYTES, size, f"length of {key!r}")
    data = stream.take(count * size, what)
    if count > _MAX_KEPT:
        return _Length(count)
    return struct.unpack(f"<{count}{_SCALARS[kind][1]}", data)


def _scalar(stream: _Stream, kind: int, what: str) -> int | float | bool:
    if kind not in _SCALARS:
        raise FormatError(f"{stream.path}: {what} is of type {kind}, which is unknown")
    return stream.number(_SCALARS[kind], what)


def _entry(stream: _Stream, alignment: int) -> GgufTensor:
    name = stream.name("tensor name")
    where = f"{stream.path}: tensor {name!r}"
    dims = stream.number("<I", f"number of dimensions of {name!r}")
    if not 1 <= dims <= MAX_DIMS:
        raise FormatError(f"{where}: {dims} dimensions, need 1 to {MAX_DIMS}")
    sizes = struct.unpack(f"<{dims}Q", stream.take(8 * dims, f"dimensions of {name!r}"))
    code = stream.number("<I", f"type of {name!r}")
    offset = stream.number("<Q", f"offset of {name!r}")
    try:
        type_ = GGMLQuantizationType(code)
    except ValueError as error:
        raise FormatError(f"{where}: type {code} is unknown") from error
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if not all(0 < size < 1 << 62 for size in sizes) or sizes[0] % block:
        raise FormatError(f"{where}: bad shape {sizes[::-1]!r:.80} for {type_.name}")
    if offset % alignment:
        raise FormatError(f"{where}: offset {offset} is no multiple of {alignment}")
    nbytes = math.prod(sizes) // block * block_bytes
    return GgufTensor(name, type_.name, sizes[::-1], stream.path, offset, nbytes)


def _placed(entries: list[GgufTensor], start: int, stream: _Stream) -> dict[str, GgufTensor]:
    """Count offsets from the start of the file; check that tensors lie in it, and apart."""
    tensors: dict[str, GgufTensor] = {}
    end = start
    for entry in sorted(entries, key=lambda entry: entry.offset):
        where = f"{stream.path}: tensor {entry.name!r}"
        offset = start + entry.offset
        if entry.name in tensors:
            raise FormatError(f"{where} appears twice")
        if offset < end:
            raise FormatError(f"{where} at {offset} overlaps the one before, which ends at {end}")
        end = offset + entry.nbytes
        if end > stream.file_bytes:
            raise FormatError(
                f"{where} ends at {end}, the file at {stream.file_bytes}; is the download complete?"
            )
        tensors[entry.name] = GgufTensor(
            entry.name, entry.type, entry.shape, entry.path, offset, entry.nbytes
        )
    return tensors
