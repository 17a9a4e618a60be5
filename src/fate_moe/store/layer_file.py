"""How is one file of records read, whoever asks?

Two descriptors: O_DIRECT where offset, length and address are 4096-aligned and the file system
takes it, buffered for the rest. A file is closed once nobody reads it any more. Knows no records.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

from fate_moe.errors import ReadError
from fate_moe.store.header import PAGE
from fate_moe.types import ExpertKey

_O_BINARY: int = getattr(os, "O_BINARY", 0)
_O_CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
_MAX_READ = 1 << 30  # bytes per call; Linux stops at 2 GiB - 4 KiB, a multiple of 4096 stays direct


class LayerFile:
    """One open layer file: a direct descriptor where that works, and a buffered one."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = str(path)
        self._lock = threading.RLock()  # of _reading and the descriptors; the collector may close
        self._idle = threading.Condition(self._lock)
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

    @property
    def descriptors(self) -> tuple[int, int]:
        """The direct one, -1 where there is none, and the buffered one.

        Whoever reads from them is to be done before `close`, which does not know of it.
        """
        return (self._direct_fd if self.is_direct else -1), self._buffered_fd

    def hold(self, offset: int, address: int, length: int) -> int:
        """Return the descriptor for this read and keep it open until `let_go`; -1 when closed."""
        direct = self.is_direct and (offset | address | length) % PAGE == 0
        with self._lock:
            if self._buffered_fd < 0:
                return -1
            self._reading += 1
            return self._direct_fd if direct else self._buffered_fd

    def let_go(self) -> None:
        """End one read."""
        with self._lock:
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
            direct = self.is_direct and is_aligned(offset + done, rest)
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


def is_aligned(offset: int, target: memoryview) -> bool:
    return (offset | address_of(target) | len(target)) % PAGE == 0


def address_of(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))
