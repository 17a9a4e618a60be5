"""What of an unfinished store is already safe on disk?

`<out>.partial` holds finished files and a journal that names them. A file is written under a
temporary name, flushed, renamed, and only then journalled; so what the journal names is whole.
A journal of another job (source or options changed) is thrown away with its files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.fields import Fields
from fate_moe.store.format import CHECKSUM
from fate_moe.store.header import load_json

JOURNAL_FILE = "journal.json"
# Written between two flushes: enough that waiting for the disk is rare, and little enough that no
# flush lasts long or leaves much for the last one.
_FLUSH_BYTES = 16 << 20


class Workdir:
    """The folder `<out>.partial` of one conversion.

    Args:
        out: the store to be.
        fingerprint: identifies source and options; 32 hex digits.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self._out = out
        self._fingerprint = fingerprint
        self._files: dict[str, tuple[int, list[str]]] = {}

    def open(self) -> None:
        """Take up the journal that is there, or start with an empty folder."""
        journal = self._read_journal()
        if journal is None:
            if self.folder.exists():
                self._remove_own()
            self.folder.mkdir()
            self._write_journal()
        else:
            self._files = journal

    def finished(self, name: str, size: int) -> list[str] | None:
        """Return the checksums of a finished file of `size` bytes, None if it must be written."""
        entry = self._files.get(name)
        path = self.folder / name
        if entry is None or entry[0] != size or not path.is_file() or path.stat().st_size != size:
            return None
        return list(entry[1])

    def finish(self, name: str, size: int, checksums: list[str]) -> None:
        """Note that a file is complete."""
        self._files[name] = (size, list(checksums))
        self._write_journal()

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file so that it is either whole under its name or not there."""
        temporary = self.folder / f"{name}.tmp"
        temporary.parent.mkdir(exist_ok=True)
        with temporary.open("wb", buffering=0) as file:
            unsafe = 0
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
                unsafe += len(piece)
                # Little by little: all at once at the end, those who make the pieces would wait.
                if unsafe >= _FLUSH_BYTES:
                    os.fsync(file.fileno())
                    unsafe = 0
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
        _sync_folder(self.folder)

    def publish(self) -> None:
        """Rename the folder to the store's name; an old store goes when the new one stands."""
        old = None
        if self._out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.old-", dir=self._out.parent))
            self._out.rename(old / self._out.name)
        self.folder.rename(self._out)
        _sync_folder(self._out.parent)
        (self._out / JOURNAL_FILE).unlink(missing_ok=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _remove_own(self) -> None:
        if any(self.folder.iterdir()) and not (self.folder / JOURNAL_FILE).is_file():
            raise StoreError(f"{self.folder}: is in the way and not ours; move it or remove it")
        shutil.rmtree(self.folder)

    def _read_journal(self) -> dict[str, tuple[int, list[str]]] | None:
        path = self.folder / JOURNAL_FILE
        try:
            fields = Fields(load_json(path.read_bytes(), str(path)), str(path))
            if fields.matching("fingerprint", CHECKSUM) != self._fingerprint:
                return None
            files = fields.fields("files")
            return {name: _journal_entry(files.fields(name)) for name in files.names(1 << 16)}
        except (OSError, FormatError):
            return None  # no journal, or a damaged one: start again

    def _write_journal(self) -> None:
        files = {n: {"bytes": size, "checksums": sums} for n, (size, sums) in self._files.items()}
        journal = {"fingerprint": self._fingerprint, "files": files}
        self.write(JOURNAL_FILE, [json.dumps(journal).encode()])


def _journal_entry(fields: Fields) -> tuple[int, list[str]]:
    return fields.integer("bytes", 0, 1 << 50), list(fields.matching_all("checksums", CHECKSUM))


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform lets a folder be opened."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
