"""Where in a safetensors file does each tensor lie?

A reader of our own, because the input is not trusted and every byte range must be known before a
byte is read; and a writer whose header is padded so that the data start on a page, which lets
O_DIRECT read plain safetensors files.

Format (safetensors README, "Format"): 8 bytes little-endian N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the
data without holes. Invariant: whatever the bytes are, the result is a valid header or FormatError.
Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fate_moe.errors import FormatError

PAGE = 4096
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 1 << 20
MAX_DIMS = 8
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of one safetensors file.

    Attributes:
        tensors: name -> entry, in file order.
        file_bytes: size of the whole file.
        digest: blake2b-128 of the header bytes and the file size, a cheap fingerprint.
    """

    tensors: Mapping[str, TensorEntry]
    file_bytes: int
    digest: str


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
        FormatError: missing file, no regular file, or any breach of the format.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise FormatError(f"{path}: not a regular file")
            return _read_header(file.read, info.st_size, str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_header(data: bytes, file_bytes: int, name: str) -> Header:
    """Check a header that is already in memory.

    Args:
        data: the first bytes of the file, at least 8 + header length.
        file_bytes: size of the whole file.
        name: the file in error messages.
    Raises:
        FormatError: any breach of the format.
    """
    view = memoryview(data)
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        position += count
        return bytes(view[position - count : position])

    return _read_header(read, file_bytes, name)


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], **metadata: str) -> bytes:
    """Build the header of a file that holds `tensors` (name, dtype, shape) in this order.

    The JSON is padded with spaces so that the data start on a multiple of 4096.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + tensor_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; exact, however large."""
    total = ITEM_BYTES[dtype]
    for size in shape:
        total *= size
    return total


def load_json(data: bytes, name: str) -> object:
    """Parse untrusted JSON: no duplicate key, no NaN, no bottomless nesting.

    Raises:
        FormatError: the bytes are not such JSON.
    """
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid JSON: {str(error)[:120]}") from error


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    for text in (item for pair in pairs for item in pair if isinstance(item, str)):
        text.encode()  # half a surrogate pair is no text: it could never be printed or written
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _read_header(read: Callable[[int], bytes], file_bytes: int, name: str) -> Header:
    prefix = read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise FormatError(
            f"{name}: header length {length} does not fit a file of {file_bytes} bytes "
            f"(limit {MAX_HEADER_BYTES}); is the download complete?"
        )
    text = read(length)
    if len(text) < length:
        raise FormatError(f"{name}: header ends after {len(text)} of {length} bytes")
    fields = load_json(text, name)
    if not isinstance(fields, dict):
        raise FormatError(f"{name}: header is not a JSON object")
    _check_metadata(fields.pop("__metadata__", {}), name)
    if len(fields) > MAX_TENSORS:
        raise FormatError(f"{name}: {len(fields)} tensors, the limit is {MAX_TENSORS}")
    start = 8 + length
    entries = [_entry(key, value, start, name) for key, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_coverage(entries, start, file_bytes, name)
    digest = hashlib.blake2b(prefix + text + b"%d" % file_bytes, digest_size=16).hexdigest()
    return Header({entry.name: entry for entry in entries}, file_bytes, digest)


def _check_metadata(value: object, name: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{name}: __metadata__ must map text to text")


def _entry(key: str, value: object, start: int, name: str) -> TensorEntry:
    where = f"{name}: tensor {key[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: must hold dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{where}: unknown dtype {dtype!r:.40}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise FormatError(f"{where}: bad shape {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: bad data_offsets {offsets!r:.80}")
    begin, end = offsets
    nbytes = tensor_bytes(dtype, shape)
    if end - begin != nbytes:
        raise FormatError(f"{where}: {dtype} {shape} is {nbytes} bytes, offsets give {end - begin}")
    return TensorEntry(key, dtype, tuple(shape), start + begin, nbytes)


def _is_sizes(value: object) -> bool:
    # type() and not isinstance(): True is an int, and no size.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_coverage(entries: list[TensorEntry], start: int, file_bytes: int, name: str) -> None:
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the one before" if entry.offset < end else "leaves a hole before it"
            raise FormatError(f"{name}: tensor {entry.name[:200]!r} at {entry.offset} {what}")
        end += entry.nbytes
    if end != file_bytes:
        raise FormatError(
            f"{name}: the file has {file_bytes} bytes, its header describes {end}; "
            "is the download complete?"
        )
