"""How does a model become a store, safely, in little memory?

Expert by expert: ask the source for a record, write it, forget it; some are made side by side and
written in order (see `ordered`). Everything is written in `<out>.partial` (see `workdir`), which
becomes `out` by one rename when it is complete; so `out` is either a whole store or not there, and
an interrupted job goes on where it stopped.

Knows neither torch nor the codec: a source hands over finished records. Invariants: never more
than `jobs` experts in work and `jobs + 2` records (one of them on its way to disk) or one copy
buffer in memory; the bytes do not depend on `jobs`; a layer that the journal calls finished is not
encoded again; nothing of the source is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

from filelock import FileLock, Timeout

from fate_moe.config import format_bytes
from fate_moe.errors import ModelError, StoreError
from fate_moe.store.format import (
    INDEX_FILE,
    MANIFEST_FILE,
    RESIDENT_FILE,
    LayerEntry,
    Manifest,
    Source,
    WholeFile,
    is_store,
    layer_file,
    layer_header,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from fate_moe.store.header import build_header, tensor_bytes
from fate_moe.store.ordered import check_jobs, default_jobs, in_order
from fate_moe.store.reader import record_checksum
from fate_moe.store.small_files import small_files
from fate_moe.store.space import check_space, held_bytes, write_error
from fate_moe.store.workdir import Workdir
from fate_moe.types import ExpertKey, Progress, no_progress

_QUANTIZING, _COPYING = "converting experts", "copying the rest"  # what progress is told
_SPARE_BYTES = 64 << 20  # manifest, tokenizer, file system overhead


@dataclass(frozen=True, slots=True)
class SourceLayer:
    """The experts of one MoE layer before they are written; fields as in `LayerEntry`."""

    path: str
    num_experts: int
    record_bytes: int
    head_bytes: int
    transposed: bool
    params: Mapping[str, tuple[int, ...]]
    layout: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor that is not a routed expert, as the source keeps it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class ExpertSource(Protocol):
    """What `convert` needs to know of a model; `models.checkpoint` has one."""

    @property
    def folder(self) -> Path:
        """Where config and tokenizer files lie."""
        ...

    @property
    def source(self) -> Source:
        """Identity and hashes."""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the experts, such as "bfloat16"."""
        ...

    @property
    def quantization(self) -> Mapping[str, object]:
        """{"bits": 4, ...}: whatever changes a record must be in here."""
        ...

    @property
    def layers(self) -> Sequence[SourceLayer]:
        """MoE layers in model order."""
        ...

    @property
    def resident(self) -> Sequence[SourceTensor]:
        """Everything else, in the order it will be written."""
        ...

    def record(self, key: ExpertKey) -> memoryview:
        """Read one expert and make its record; uint8 [record_bytes]. Any thread may call it."""
        ...

    def read_resident(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the bytes of one resident tensor in pieces of at most a few MiB."""
        ...

    def small_file(self, name: str) -> bytes:
        """Read one of `small_files(folder)`, as the store shall hold it."""
        ...


def convert(
    source: ExpertSource,
    out: Path,
    *,
    force: bool = False,
    wait: bool = False,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write `source` as a store.

    Args:
        source: the model.
        out: folder of the store; must not exist, or hold a store.
        force: replace a store that stands at `out`, once the new one is complete.
        wait: let another process that converts to `out` finish, instead of refusing.
        jobs: experts to convert side by side, 1 to 256, but never more than a layer has; None =
            `default_jobs`. The store is the same for any number.
        progress: receives bytes written of bytes to write, from the caller's thread.
    Returns:
        The manifest; at once if `out` already is the store of this source with these options.
    Raises:
        StoreError: `out` is taken, cannot be written, the disk is full or has too little space
            (found before anything is written), or another process converts to it.
        ModelError, FormatError: the source is damaged or incomplete.
        ConfigError: a number of jobs that cannot be.
        KeyboardInterrupt: as it came, once the experts in work are done; `<out>.partial` stays and
            the next call goes on from it.
    Memory: `jobs` experts and their records, whatever the model's size; never beyond two layers
        of experts in float32.
    """
    check_jobs(jobs)
    out = out.absolute()
    job = _Job(source, out, jobs or default_jobs(_expert_weights(source)), progress)
    try:
        found = _existing(source, out, force)
        if found is not None:  # needs no lock, and no right to write
            return found
        _check_writable(out)
        job.check_space()
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=-1 if wait else 0):
            found = _existing(source, out, force)
            return found if found is not None else job.run()
    except Timeout as error:
        raise StoreError(f"{out}: another process is converting to it") from error
    except OSError as error:
        raise write_error(out, error) from error


def is_made_from(manifest: Manifest, source: ExpertSource) -> bool:
    """Tell whether a store holds exactly this source with these quantization options."""
    return (
        dict(manifest.source.files) == dict(source.source.files)
        and dict(manifest.quantization) == dict(source.quantization)
        and [layer.path for layer in manifest.layers] == [layer.path for layer in source.layers]
    )


def _existing(source: ExpertSource, out: Path, force: bool) -> Manifest | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_store(out):
        raise StoreError(f"{out}: exists and is no store; choose another folder or remove it")
    if force:
        return None
    manifest = read_manifest(out)
    if not is_made_from(manifest, source):
        raise StoreError(
            f"{out}: holds a store of {manifest.source.id} with other content or options; "
            "use --force to replace it (force=True in Python)"
        )
    return manifest


class _Job:
    """One conversion: layers, the rest, small files, manifest, rename."""

    def __init__(self, source: ExpertSource, out: Path, jobs: int, progress: Progress) -> None:
        self._source = source
        self._out = out
        # More would hold more than a layer: beyond the bound, for a layer's files one by one.
        self._jobs = min(jobs, *(layer.num_experts for layer in source.layers))
        self._progress = progress
        self._work = Workdir(out, _fingerprint(source))
        self._resident_header = build_header([(t.name, t.dtype, t.shape) for t in source.resident])
        # Apart, because a quantized byte takes far longer than a copied one.
        self._totals = {
            _QUANTIZING: sum(_layer_bytes(layer) for layer in source.layers),
            _COPYING: self._resident_bytes,
        }
        self._done = dict.fromkeys(self._totals, 0)

    def check_space(self) -> None:
        """Refuse when the disk has no room for the store beside what is there."""
        # What lies in the work folder is finished, or will be overwritten or removed.
        held = held_bytes(self._work.folder)
        need = sum(self._totals.values()) + _SPARE_BYTES - held
        hint = "free some space, or give a store on another disk"
        if self._out.exists():
            old = format_bytes(held_bytes(self._out))
            hint = f"the old store ({old}) stays until the new one is whole; remove it or {hint}"
        check_space(self._work.folder, need, hint)

    def run(self) -> Manifest:
        """Make the store, or go on where an earlier try stopped."""
        source = self._source
        self._work.open()
        layers = self._layers()
        resident = self._resident()
        manifest = Manifest(source.source, source.dtype, source.quantization, layers, resident)
        self._small_files()
        data = write_manifest(manifest)
        parse_manifest(data)  # what we write, we can read
        self._work.write(MANIFEST_FILE, [data])
        self._work.publish()
        return manifest

    @property
    def _resident_bytes(self) -> int:
        tensors = self._source.resident
        return len(self._resident_header) + sum(tensor_bytes(t.dtype, t.shape) for t in tensors)

    def _layers(self) -> tuple[LayerEntry, ...]:
        layers = self._source.layers
        checksums = [
            self._work.finished(layer_file(i), _layer_bytes(layer))
            for i, layer in enumerate(layers)
        ]
        missing = (
            ExpertKey(i, expert)
            for i, layer in enumerate(layers)
            if checksums[i] is None
            for expert in range(layer.num_experts)
        )
        # One run for all layers: nobody waits at the end of one.
        with closing(in_order(self._record, missing, self._jobs)) as records:
            return tuple(
                self._layer(i, layer, checksums[i], records) for i, layer in enumerate(layers)
            )

    def _layer(
        self,
        index: int,
        layer: SourceLayer,
        checksums: list[str] | None,
        records: Iterator[tuple[memoryview, str]],
    ) -> LayerEntry:
        file = layer_file(index)
        header = layer_header(layer.num_experts, layer.record_bytes)
        size = _layer_bytes(layer)
        if checksums is None:
            checksums = []
            own = islice(records, layer.num_experts)
            self._work.write(file, self._layer_pieces(header, own, checksums))
            self._work.finish(file, size, checksums)
        else:
            self._advance(_QUANTIZING, size)
        return LayerEntry(
            path=layer.path,
            file=file,
            num_experts=layer.num_experts,
            record_bytes=layer.record_bytes,
            head_bytes=layer.head_bytes,
            first_offset=len(header),
            transposed=layer.transposed,
            params=layer.params,
            layout=layer.layout,
            checksums=tuple(checksums),
        )

    def _layer_pieces(
        self, header: bytes, records: Iterator[tuple[memoryview, str]], checksums: list[str]
    ) -> Iterator[bytes | memoryview]:
        yield self._count(_QUANTIZING, header)
        for record, checksum in records:
            checksums.append(checksum)
            yield self._count(_QUANTIZING, record)

    def _record(self, key: ExpertKey) -> tuple[memoryview, str]:
        """Make a record and its checksum; runs in several threads at once."""
        record = self._source.record(key)
        need = self._source.layers[key.layer].record_bytes
        if len(record) != need:
            raise ModelError(f"{key}: {len(record)} bytes, the layer has {need} per record")
        return record, record_checksum(record)

    def _resident(self) -> WholeFile:
        size = self._resident_bytes
        done = self._work.finished(RESIDENT_FILE, size)
        if done is None:
            digest = hashlib.blake2b(digest_size=16)
            self._work.write(RESIDENT_FILE, _hashed(self._resident_pieces(), digest))
            done = [digest.hexdigest()]
            self._work.finish(RESIDENT_FILE, size, done)
        else:
            self._advance(_COPYING, size)
        return WholeFile(RESIDENT_FILE, size, done[0])

    def _resident_pieces(self) -> Iterator[bytes | memoryview]:
        yield self._count(_COPYING, self._resident_header)
        for tensor in self._source.resident:
            for piece in self._source.read_resident(tensor.name):
                yield self._count(_COPYING, piece)

    def _small_files(self) -> None:
        for name in small_files(self._source.folder):
            self._work.write(name, [self._source.small_file(name)])
        tensors = self._source.resident
        total = sum(tensor_bytes(t.dtype, t.shape) for t in tensors)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {t.name: RESIDENT_FILE for t in tensors},
        }
        self._work.write(INDEX_FILE, [json.dumps(index, indent=1).encode()])

    def _count(self, what: str, piece: bytes | memoryview) -> bytes | memoryview:
        self._advance(what, len(piece))
        return piece

    def _advance(self, what: str, count: int) -> None:
        self._done[what] += count
        self._progress(what, self._done[what], self._totals[what])


def _check_writable(out: Path) -> None:
    """Refuse where no file can be made: the space of such a file system says nothing."""
    there = out.parent
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise StoreError(
            f"{out}: cannot be written: {there} takes no files ({error.strerror or error}); "
            "give a folder that you may write to"
        ) from error


def _hashed(
    pieces: Iterable[bytes | memoryview], digest: hashlib.blake2b
) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _expert_weights(source: ExpertSource) -> int:
    layers = source.layers
    return max(sum(math.prod(s[1:]) for s in layer.params.values()) for layer in layers)


def _layer_bytes(layer: SourceLayer) -> int:
    header = layer_header(layer.num_experts, layer.record_bytes)
    return len(header) + layer.num_experts * layer.record_bytes


def _fingerprint(source: ExpertSource) -> str:
    """Hash everything that decides what the files hold; a journal is only good for its own."""
    facts = {
        "files": dict(source.source.files),
        "quantization": dict(source.quantization),
        "layers": [(x.path, x.num_experts, x.record_bytes, x.layout) for x in source.layers],
        "resident": [(t.name, t.dtype, t.shape) for t in source.resident],
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
