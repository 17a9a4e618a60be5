"""How do a few small arrays get into a safetensors file and back?

A file is written whole or not at all. What is read was written by anyone: every array lies inside
the file, as `header` has checked, and is of a known type; what it means is for the caller to check.
No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.header import read_header

Arrays = Mapping[str, NDArray[Any]]
_TYPES = {
    "U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32,
}  # fmt: skip


def write_arrays(arrays: Arrays, path: Path) -> None:
    """Write arrays in place of whatever is there.

    Raises:
        StoreError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(dict(arrays), part)
        part.replace(path)
    except Exception as error:
        part.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"{path}: cannot be written: {why}") from error


def read_arrays(path: Path, most_bytes: int) -> dict[str, NDArray[Any]]:
    """Read all arrays of a file.

    Raises:
        FormatError: the file is missing, damaged, too large, or holds other types.
    """
    header = read_header(path)
    if header.file_bytes > most_bytes:
        raise FormatError(f"{path}: {header.file_bytes} bytes, at most {most_bytes} are read")
    arrays = {}
    with path.open("rb") as file:
        for name, entry in header.tensors.items():
            if entry.dtype not in _TYPES:
                raise FormatError(f"{path}: {name!r:.80} is of {entry.dtype}")
            file.seek(entry.offset)
            data = np.frombuffer(file.read(entry.nbytes), _TYPES[entry.dtype])
            arrays[name] = data.reshape(entry.shape)
    return arrays
