"""What was fitted on a text for a store's model, and is it of this store?

For each MoE layer up to two linear maps that tell its router's scores ahead of it (see
`predict/ridge.py`): `early.N.weight` [E, D], `early.N.bias` [E], and the same for `late`. They lie
in one file that the manifest names with its checksum. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.arrays import read_arrays, write_arrays
from fate_moe.store.format import MANIFEST_FILE, Manifest, WholeFile, write_manifest

FITTED_FILE = "fitted.safetensors"
STAGES = ("early", "late")
_MOST_BYTES = 2**33


@dataclass(frozen=True, slots=True)
class Map:
    """scores = weight @ x + bias; float32 [E, D] and [E]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


Maps = Mapping[str, list[Map | None]]
"""By stage, early or late: a map for each MoE layer, [L]; None where there is none."""


def write_fitted(folder: Path, manifest: Manifest, maps: Maps) -> Manifest:
    """Write maps into a store, in place of earlier ones, and return its new manifest.

    Raises:
        StoreError: the store cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for stage in STAGES:
        for layer, one in enumerate(maps[stage]):
            if one is not None:
                arrays[f"{stage}.{layer}.weight"] = one.weight.astype(np.float16)
                arrays[f"{stage}.{layer}.bias"] = one.bias
    # The manifest must never name a file that is not there: first the new file, then the manifest,
    # then the old file's end.
    data = hashlib.blake2b(digest_size=4)
    for name in sorted(arrays):
        data.update(arrays[name].tobytes())
    name = f"{FITTED_FILE.removesuffix('.safetensors')}-{data.hexdigest()}.safetensors"
    path = folder / name
    write_arrays(arrays, path)
    size, checksum = path.stat().st_size, _checksum(path)
    changed = replace(manifest, fitted=WholeFile(name, size, checksum))
    part = folder / f"{MANIFEST_FILE}.part"
    try:
        part.write_bytes(write_manifest(changed))
        part.replace(folder / MANIFEST_FILE)
        if manifest.fitted is not None and manifest.fitted.file != name:
            (folder / manifest.fitted.file).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return changed


def read_fitted(folder: Path, manifest: Manifest, hidden: int) -> Maps:
    """Read the maps of a store; all None where nothing was fitted.

    Args:
        hidden: D of the model.
    Raises:
        FormatError: the file is missing, not as it was written, or of another model.
    """
    if manifest.fitted is None:
        return {stage: [None] * len(manifest.layers) for stage in STAGES}
    path = folder / manifest.fitted.file
    maps = read_maps(path, manifest, hidden)
    if _checksum(path) != manifest.fitted.checksum:
        raise FormatError(f"{path}: not as it was written; run fate calibrate again")
    return maps


def read_maps(path: Path, manifest: Manifest, hidden: int) -> Maps:
    """Read maps from a file that fits a store, its own or one that was fitted for its model.

    Args:
        hidden: D of the model.
    Raises:
        FormatError: the file is missing, damaged, or of another model.
    """
    arrays = read_arrays(path, _MOST_BYTES)
    found: dict[str, list[Map | None]] = {stage: [None] * len(manifest.layers) for stage in STAGES}
    for stage, maps in found.items():
        for layer, entry in enumerate(manifest.layers):
            weight = arrays.pop(f"{stage}.{layer}.weight", None)
            bias = arrays.pop(f"{stage}.{layer}.bias", None)
            if weight is None or bias is None:
                continue
            if weight.shape != (entry.num_experts, hidden) or bias.shape != (entry.num_experts,):
                raise FormatError(f"{path}: the {stage} map of layer {layer} is of another model")
            maps[layer] = Map(weight.astype(np.float32), bias.astype(np.float32))
    if arrays:
        raise FormatError(f"{path}: {min(arrays)!r:.80} belongs to no layer")
    return found


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()
