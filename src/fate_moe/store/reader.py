"""How do the bytes of one record get from disk into a slot?

Positional reads into memory the caller owns; no copy, no cache of our own. O_DIRECT where offset,
length and address are 4096-aligned and the file system takes it, so that expert bytes are not kept
twice (slot and page cache); buffered elsewhere, also where the platform has neither. Several small
records come in with one call of the native core (csrc/io.h), where it is there.

Invariants: a read either fills the buffer or gives a ReadError; any thread may call; layer files
are opened once and checked against the manifest before the first read. Knows no torch.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fate_moe import native
from fate_moe.errors import FormatError, ReadError
from fate_moe.store.format import LayerEntry, Manifest, record_name
from fate_moe.store.header import PAGE, read_header
from fate_moe.types import ExpertKey

Mode = Literal["O_DIRECT", "buffered"]

_O_BINARY: int = getattr(os, "O_BINARY", 0)
_O_CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
_MAX_READ = 1 << 30  # bytes per call; Linux stops at 2 GiB - 4 KiB, a multiple of 4096 stays direct
_DEPTH = 64  # reads under way in one call of the native core
_BATCH_BYTES = 1 << 20  # from here on a disk is as fast with single reads, which land one by one


class RecordReader(Protocol):
    """Reads records; what the mover knows of the store."""

    @property
    def mode(self) -> Mode:
        """How the bytes come in, for reports."""
        ...

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        ...

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        """Fill buffer[:length] with record[start : start + length].

        Args:
            key: which record.
            buffer: writable, contiguous, at least `length` bytes.
            start: first byte of the record to read.
            length: how many bytes; the rest of the record if None.
        Raises:
            ReadError: the bytes could not be read or fail their checksum.
        """
        ...

    def close(self) -> None:
        """Give back the files; later reads raise ReadError."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One read among several: fill buffer[:length] with record[start : start + length]."""

    key: ExpertKey
    buffer: memoryview
    start: int = 0
    length: int | None = None


@runtime_checkable
class BatchReader(RecordReader, Protocol):
    """A RecordReader that is quicker with several small records at once."""

    @property
    def batch_bytes(self) -> int:
        """Most bytes that gain from being asked for together; 0 = none do."""
        ...

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Do all requests; returns what each would have raised from `read_into`, in order."""
        ...


class FileReader:
    """A BatchReader over the layer files of a store folder.

    Args:
        folder: the store.
        manifest: its manifest.
        direct: try O_DIRECT.
        verify_on_read: check each record's checksum when it is read for the first time.
        way: how batches are read, one of the native core's `read_ways` or "plain", one after the
            other; None = the best there is.
    Raises:
        FormatError: a layer file is missing or is not what the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        direct: bool = True,
        verify_on_read: bool = False,
        way: str | None = None,
    ) -> None:
        self._layers = manifest.layers
        self._reads = _open_reads(way)
        self._verify_on_read = verify_on_read
        self._verified: set[ExpertKey] = set()
        self._files: list[_LayerFile] = []
        try:
            for entry in manifest.layers:
                check_layer_file(folder / entry.file, entry)
                self._files.append(_LayerFile(folder / entry.file, direct))
        except OSError as error:
            self.close()
            raise FormatError(f"{entry.file}: cannot be opened: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def mode(self) -> Mode:
        """ "O_DIRECT" while every layer file is read that way, else "buffered"."""
        return "O_DIRECT" if all(file.is_direct for file in self._files) else "buffered"

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        return self._layers[layer].record_bytes

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        """Fill buffer[:length] with record[start : start + length]; see RecordReader."""
        self._finish(self._place(key, buffer, start, length), 0)

    @property
    def batch_bytes(self) -> int:
        """Most bytes that gain from being asked for together; 0 without the native core."""
        return 0 if self._reads is None else _BATCH_BYTES

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Do all requests; returns what each would have raised from `read_into`, in order."""
        outcomes: list[ReadError | None] = [None] * len(requests)
        places: dict[int, _Place] = {}
        for i, request in enumerate(requests):
            try:
                places[i] = self._place(request.key, request.buffer, request.start, request.length)
            except ReadError as error:
                outcomes[i] = error
        counts = self._read_together(list(places.values()))
        for (i, place), done in zip(places.items(), counts, strict=True):
            try:
                self._finish(place, done)
            except ReadError as error:
                outcomes[i] = error
        return outcomes

    def close(self) -> None:
        """Close the files; reads that are under way finish first."""
        for file in self._files:
            file.close()

    def _place(self, key: ExpertKey, buffer: memoryview, start: int, length: int | None) -> _Place:
        if not (0 <= key.layer < len(self._files)):
            raise ReadError(key, "store", 0, None, f"the store has {len(self._files)} MoE layers")
        entry, file = self._layers[key.layer], self._files[key.layer]
        if not 0 <= key.expert < entry.num_experts:
            raise ReadError(key, file.path, 0, None, f"the layer has {entry.num_experts} experts")
        length = entry.record_bytes - start if length is None else length
        target = buffer.cast("B") if buffer.format != "B" else buffer
        if not (start >= 0 and 0 < length <= entry.record_bytes - start and len(target) >= length):
            raise ReadError(
                key, file.path, entry.offset(key.expert), None,
                f"bytes {start}+{length} into {len(target)} of a {entry.record_bytes} byte record",
            )  # fmt: skip
        return _Place(key, entry, file, entry.offset(key.expert) + start, target[:length])

    def _read_together(self, places: Sequence[_Place]) -> list[int]:
        """Return how many bytes of each came in; what is missing is left to the plain way."""
        if self._reads is None:
            return [0] * len(places)
        held: list[_LayerFile] = []
        try:
            wanted = []
            for place in places:
                fd = place.file.hold(place.offset, place.target)
                if fd < 0:
                    return [0] * len(places)
                held.append(place.file)
                wanted.append((fd, place.offset, _address(place.target), len(place.target)))
            return [done for done, _ in self._reads.read(wanted)]
        finally:
            for file in held:
                file.let_go()

    def _finish(self, place: _Place, done: int) -> None:
        """Read what is missing after the first `done` bytes and check the record if asked to."""
        if done < len(place.target):
            place.file.read(place.key, place.offset + done, place.target[done:])
        if self._verify_on_read and place.key not in self._verified:
            self._verify(place)

    def _verify(self, place: _Place) -> None:
        key, entry, whole = place.key, place.entry, place.target
        offset = entry.offset(key.expert)
        if len(whole) < entry.record_bytes:  # only the whole record has a checksum
            whole = memoryview(bytearray(entry.record_bytes))
            place.file.read(key, offset, whole)
        found = record_checksum(whole)
        if found != entry.checksums[key.expert]:
            expected = entry.checksums[key.expert]
            raise ReadError(
                key, place.file.path, offset, None,
                f"checksum {found}, expected {expected}: run verify",
            )  # fmt: skip
        self._verified.add(key)


@dataclass(frozen=True, slots=True)
class _Place:
    key: ExpertKey
    entry: LayerEntry
    file: _LayerFile
    offset: int  # in the file
    target: memoryview


def record_checksum(record: bytes | bytearray | memoryview) -> str:
    """Checksum of one record: blake2b, 128 bits, hex."""
    return hashlib.blake2b(record, digest_size=16).hexdigest()


def check_layer_file(path: Path, entry: LayerEntry) -> None:
    """Check that a layer file's header is what the manifest says; reads no record.

    Raises:
        FormatError: the file is missing, damaged, or holds other records.
    """
    header = read_header(path)
    if len(header.tensors) != entry.num_experts:
        raise FormatError(f"{path}: {len(header.tensors)} records, need {entry.num_experts}")
    for expert in range(entry.num_experts):
        tensor = header.tensors.get(record_name(expert))
        place = (entry.offset(expert), entry.record_bytes)
        if tensor is None or tensor.dtype != "U8" or (tensor.offset, tensor.nbytes) != place:
            raise FormatError(f"{path}: record of expert {expert} is not at {place[0]}+{place[1]}")


class _LayerFile:
    """One open layer file: a direct descriptor where that works, and a buffered one."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = str(path)
        self._idle = threading.Condition()  # guards _reading and the descriptors
        self._reading = 0
        self._seek_lock = threading.Lock()  # makes seek + read one step where preadv is missing
        self._buffered_fd = os.open(path, os.O_RDONLY | _O_BINARY | _O_CLOEXEC)
        self._direct_fd = _open_direct(path) if direct else -1
        self.is_direct = self._direct_fd >= 0

    def read(self, key: ExpertKey, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset`; raise ReadError."""
        with self._idle:
            if self._buffered_fd < 0:
                raise ReadError(key, self.path, offset, None, "the store is closed")
            self._reading += 1
        try:
            self._read_all(key, offset, target)
        finally:
            self.let_go()

    def hold(self, offset: int, target: memoryview) -> int:
        """Return the descriptor for this read and keep it open until `let_go`; -1 when closed."""
        direct = self.is_direct and _is_aligned(offset, target)
        with self._idle:
            if self._buffered_fd < 0:
                return -1
            self._reading += 1
            return self._direct_fd if direct else self._buffered_fd

    def let_go(self) -> None:
        """End one read."""
        with self._idle:
            self._reading -= 1
            if self._reading == 0:
                self._idle.notify_all()

    def close(self) -> None:
        """Wait for the reads under way, then close both descriptors."""
        with self._idle:
            fds = (self._buffered_fd, self._direct_fd)
            self._buffered_fd = self._direct_fd = -1
            self._idle.wait_for(lambda: self._reading == 0)
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _read_all(self, key: ExpertKey, offset: int, target: memoryview) -> None:
        direct_fd, buffered_fd = self._direct_fd, self._buffered_fd
        done = 0
        while done < len(target):
            rest = target[done:]
            direct = self.is_direct and _is_aligned(offset + done, rest)
            try:
                count = self._read_some(direct_fd if direct else buffered_fd, offset + done, rest)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    self.is_direct = False  # this file system takes the flag but not the reads
                    continue
                why = error.strerror or "read failed"
                raise ReadError(key, self.path, offset + done, error.errno, why) from error
            if count == 0:
                raise ReadError(key, self.path, offset + done, None, "the file ends here")
            done += count

    def _read_some(self, fd: int, offset: int, target: memoryview) -> int:
        preadv = getattr(os, "preadv", None)  # missing on Windows; PEP 475 retries EINTR
        if preadv is not None:
            return int(preadv(fd, [target[:_MAX_READ]], offset))
        with self._seek_lock:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, min(len(target), _MAX_READ))
        target[: len(data)] = data
        return len(data)


def _open_direct(path: Path) -> int:
    flag: int = getattr(os, "O_DIRECT", 0)
    if not flag:
        return -1
    try:
        return os.open(path, os.O_RDONLY | _O_CLOEXEC | flag)
    except OSError:
        return -1  # tmpfs and some network file systems refuse the flag


def _is_aligned(offset: int, target: memoryview) -> bool:
    if offset % PAGE or len(target) % PAGE:
        return False
    return _address(target) % PAGE == 0


def _address(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))


def _open_reads(way: str | None) -> Any:
    if way == "plain" or not native.is_available():
        return None
    core = native.core()
    ways = core.read_ways() if way is None else [way]
    return core.open_reads(ways[0], _DEPTH) if ways else None
