"""How does a model become a store, safely, in little memory?

One expert at a time: ask the source for a record, write it, forget it. Everything is written in
`<out>.partial` (see `workdir`), which becomes `out` by one rename when it is complete; so `out` is
either a whole store or not there, and an interrupted job goes on where it stopped.

Knows neither torch nor the codec: a source hands over finished records. Invariants: never more
than one record and one copy buffer in memory; a layer that the journal calls finished is not
encoded again; nothing of the source is executed or unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from fate_moe.errors import ModelError, StoreError
from fate_moe.store.format import (
    INDEX_FILE,
    MANIFEST_FILE,
    RESIDENT_FILE,
    LayerEntry,
    Manifest,
    Resident,
    Source,
    is_store,
    layer_file,
    layer_header,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from fate_moe.store.header import build_header, tensor_bytes
from fate_moe.store.reader import record_checksum
from fate_moe.store.workdir import JOURNAL_FILE, Workdir
from fate_moe.types import ExpertKey, Progress, no_progress

_QUANTIZING, _COPYING = "converting experts", "copying the rest"  # what progress is told
_SPARE_BYTES = 64 << 20  # manifest, tokenizer, file system overhead
# What may come along, by name: never code, never pickles, never other weights.
_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_TEMPLATE_FOLDER = "additional_chat_templates"
_MAX_COPIED_BYTES = 1 << 28


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
        """Read one expert and make its record; uint8 [record_bytes]."""
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
    progress: Progress = no_progress,
) -> Manifest:
    """Write `source` as a store.

    Args:
        source: the model.
        out: folder of the store; must not exist, or hold a store.
        force: replace a store that stands at `out`, once the new one is complete.
        wait: let another process that converts to `out` finish, instead of refusing.
        progress: receives bytes written of bytes to write.
    Returns:
        The manifest; at once if `out` already is the store of this source with these options.
    Raises:
        StoreError: `out` is taken, cannot be written, the disk is full, or another process
            converts to it.
        ModelError, FormatError: the source is damaged or incomplete.
        KeyboardInterrupt: as it came; `<out>.partial` stays and the next call goes on from it.
    Memory: one expert at a time, whatever the model's size.
    """
    out = out.absolute()
    try:
        found = _existing(source, out, force)
        if found is not None:  # needs no lock, and no right to write
            return found
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=-1 if wait else 0):
            found = _existing(source, out, force)
            return found if found is not None else _Job(source, out, progress).run()
    except Timeout as error:
        raise StoreError(f"{out}: another process is converting to it") from error
    except OSError as error:
        raise _store_error(out, error) from error


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
            "use force to replace it"
        )
    return manifest


class _Job:
    """One conversion: layers, the rest, small files, manifest, rename."""

    def __init__(self, source: ExpertSource, out: Path, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._work = Workdir(out, _fingerprint(source))
        self._resident_header = build_header([(t.name, t.dtype, t.shape) for t in source.resident])
        # Apart, because a quantized byte takes far longer than a copied one.
        self._totals = {
            _QUANTIZING: sum(_layer_bytes(layer) for layer in source.layers),
            _COPYING: self._resident_bytes,
        }
        self._done = dict.fromkeys(self._totals, 0)

    def run(self) -> Manifest:
        source = self._source
        self._work.open()
        self._check_space()
        layers = tuple(self._layer(i, layer) for i, layer in enumerate(source.layers))
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

    def _check_space(self) -> None:
        need = sum(self._totals.values()) - self._work.finished_bytes + _SPARE_BYTES
        have = shutil.disk_usage(self._work.folder).free
        if have < need:
            raise StoreError(
                f"{self._work.folder}: not enough disk space: need {need} bytes, have {have}"
            )

    def _layer(self, index: int, layer: SourceLayer) -> LayerEntry:
        file = layer_file(index)
        header = layer_header(layer.num_experts, layer.record_bytes)
        size = _layer_bytes(layer)
        checksums = self._work.finished(file, size)
        if checksums is None:
            checksums = []
            self._work.write(file, self._records(index, layer, header, checksums))
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

    def _records(
        self, index: int, layer: SourceLayer, header: bytes, checksums: list[str]
    ) -> Iterator[bytes | memoryview]:
        yield self._count(_QUANTIZING, header)
        for expert in range(layer.num_experts):
            key = ExpertKey(index, expert)
            record = self._source.record(key)
            if len(record) != layer.record_bytes:
                raise ModelError(
                    f"{key}: {len(record)} bytes, the layer has {layer.record_bytes} per record"
                )
            checksums.append(record_checksum(record))
            yield self._count(_QUANTIZING, record)

    def _resident(self) -> Resident:
        size = self._resident_bytes
        done = self._work.finished(RESIDENT_FILE, size)
        if done is None:
            digest = hashlib.blake2b(digest_size=16)
            self._work.write(RESIDENT_FILE, _hashed(self._resident_pieces(), digest))
            done = [digest.hexdigest()]
            self._work.finish(RESIDENT_FILE, size, done)
        else:
            self._advance(_COPYING, size)
        return Resident(RESIDENT_FILE, size, done[0])

    def _resident_pieces(self) -> Iterator[bytes | memoryview]:
        yield self._count(_COPYING, self._resident_header)
        for tensor in self._source.resident:
            for piece in self._source.read_resident(tensor.name):
                yield self._count(_COPYING, piece)

    def _small_files(self) -> None:
        for name in small_files(self._source.folder):
            path = self._source.folder / name
            if path.stat().st_size > _MAX_COPIED_BYTES:
                raise ModelError(f"{path}: larger than {_MAX_COPIED_BYTES} bytes")
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


def small_files(folder: Path) -> list[str]:
    """Name config, tokenizer, chat template and licence files, relative to `folder`."""
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and (path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES)
        and not path.name.endswith(".index.json")
        and path.name not in (MANIFEST_FILE, JOURNAL_FILE)
    ]
    templates = (folder / _TEMPLATE_FOLDER).glob("*.jinja")
    return sorted(names) + sorted(f"{_TEMPLATE_FOLDER}/{path.name}" for path in templates)


def _hashed(
    pieces: Iterable[bytes | memoryview], digest: hashlib.blake2b
) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


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


def _store_error(out: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{out}: the disk is full; free some space and run again, finished layers are kept"
        )
    where = error.filename or out
    return StoreError(f"{where}: cannot be written: {error.strerror or error}")
