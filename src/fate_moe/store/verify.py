"""Is every byte of a store still what was written?

Reads all files in pieces and recomputes every checksum. Findings name layer, expert and offset;
a damaged store gives findings, only an unreadable manifest raises.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fate_moe.errors import FormatError
from fate_moe.store.format import (
    LayerEntry,
    Manifest,
    WholeFile,
    layer_header,
    read_manifest,
)
from fate_moe.store.reader import check_layer_file, record_checksum
from fate_moe.types import ExpertKey, Progress, no_progress

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: file name in the store.
        key: the expert whose record it is, None for the resident file or a whole layer file.
        offset: byte offset in the file.
        why: what was found and what was expected.
    """

    file: str
    key: ExpertKey | None
    offset: int
    why: str

    def __str__(self) -> str:
        who = f"{self.key}: " if self.key else ""
        return f"{who}{self.file} at offset {self.offset}: {self.why}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` read and what it found; `records` counts the intact ones."""

    records: int
    bytes_read: int
    findings: tuple[Finding, ...]

    @property
    def is_intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def verify(folder: Path, progress: Progress = no_progress) -> VerifyReport:
    """Recompute every checksum of the store in `folder`.

    Raises:
        StoreError: there is no store.
        FormatError: the manifest cannot be understood.
    """
    return _Check(folder, read_manifest(folder), progress).run()


class _Check:
    def __init__(self, folder: Path, manifest: Manifest, progress: Progress) -> None:
        self._folder = folder
        self._manifest = manifest
        self._progress = progress
        self._total = sum(x.file_bytes for x in manifest.layers) + manifest.resident.bytes
        self._read_bytes = 0
        self._intact = 0
        self._findings: list[Finding] = []

    def run(self) -> VerifyReport:
        for index, entry in enumerate(self._manifest.layers):
            self._layer(index, entry)
        for whole in (self._manifest.resident, self._manifest.fitted):
            if whole is not None:
                self._whole(whole)
        return VerifyReport(self._intact, self._read_bytes, tuple(self._findings))

    def _layer(self, index: int, entry: LayerEntry) -> None:
        path = self._folder / entry.file
        try:
            check_layer_file(path, entry)
        except FormatError as error:
            self._findings.append(Finding(entry.file, None, 0, str(error)))
            if not path.is_file():
                return
        header = layer_header(entry.num_experts, entry.record_bytes)
        if self._digest(path, 0, len(header)) != record_checksum(header):
            self._findings.append(Finding(entry.file, None, 0, "the header is not as written"))
        for expert in range(entry.num_experts):
            offset = entry.offset(expert)
            found = self._digest(path, offset, entry.record_bytes)
            if found == entry.checksums[expert]:
                self._intact += 1
            else:
                why = f"checksum {found}, expected {entry.checksums[expert]}"
                self._findings.append(Finding(entry.file, ExpertKey(index, expert), offset, why))

    def _whole(self, entry: WholeFile) -> None:
        path = self._folder / entry.file
        found = self._digest(path, 0, entry.bytes)
        if found != entry.checksum:
            why = f"checksum {found}, expected {entry.checksum}"
            self._findings.append(Finding(entry.file, None, 0, why))
        elif path.stat().st_size != entry.bytes:
            why = f"{path.stat().st_size} bytes, expected {entry.bytes}"
            self._findings.append(Finding(entry.file, None, entry.bytes, why))

    def _digest(self, path: Path, offset: int, length: int) -> str:
        """Hash a range; a word instead of the digest if it cannot be read."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while length:
                    piece = file.read(min(length, _PIECE_BYTES))
                    if not piece:
                        return "missing: the file ends too early"
                    digest.update(piece)
                    length -= len(piece)
                    self._read_bytes += len(piece)
                    self._progress("verify", self._read_bytes, self._total)
        except OSError as error:
            return f"missing: {error.strerror or error}"
        return digest.hexdigest()
