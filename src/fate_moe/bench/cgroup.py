"""How does a command get no more memory, and no faster a disk, than it is given?

Linux control groups, version 2 or 1; needs root. A group holds the command and its children. Pages
of files that they read count as memory, too, and leave before the limit is broken: so a program
that maps its weights slows down, and one that allocates them is killed. Reads from the disk wait
until the rate allows them, whether they go through the system's pages or past them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fate_moe.errors import ConfigError

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
_V1_DISK = Path("/sys/fs/cgroup/blkio")
# By the limit's name: the most it held, and the limit of swap (v1: of both together).
_PEAK = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}
_SWAP = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}
_ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 126; shift; done; shift; exec "$@"'


@dataclass(frozen=True, slots=True)
class DiskRate:
    """How fast a disk may be read.

    Attributes:
        device: its numbers, such as "254:0": of the whole disk, not of a partition.
        bytes_s: bytes per second.
    """

    device: str
    bytes_s: int


def _root() -> tuple[Path, str] | None:
    if (_V2 / "cgroup.controllers").is_file():
        return _V2, "memory.max"
    if (_V1 / "memory.limit_in_bytes").is_file():
        return _V1, "memory.limit_in_bytes"
    return None


def _disk_root() -> tuple[Path, str, str] | None:
    """Return where disk groups are made, the file that holds the limit, and its form."""
    if (_V2 / "cgroup.controllers").is_file():
        return _V2, "io.max", "{device} rbps={bytes_s}"
    if _V1_DISK.is_dir():
        return _V1_DISK, "blkio.throttle.read_bps_device", "{device} {bytes_s}"
    return None


def group_folder(number: int) -> Path:
    """Name the folder of a memory group; `limited` numbers it by its own process."""
    root = _root()
    return (root[0] if root else _V2) / f"fate-{number}"


def unavailable(limit_bytes: int | None = 1 << 30, disk: DiskRate | None = None) -> str | None:
    """Say why no group with such limits can be made, or None when one can."""
    try:
        with Group(limit_bytes, os.getpid(), disk):
            return None
    except ConfigError as error:
        return str(error)


class Group:
    """Processes that share `limit_bytes`, swap excluded, and a disk's rate. Use it with `with`.

    Raises:
        ConfigError: no such group can be made here.
    """

    def __init__(self, limit_bytes: int | None, number: int, disk: DiskRate | None = None) -> None:
        self._folders: list[Path] = []
        self._peak: Path | None = None
        if limit_bytes is not None:
            self._limit_memory(limit_bytes, number)
        if disk is not None:
            self._limit_disk(disk, number)

    def _limit_memory(self, limit_bytes: int, number: int) -> None:
        root = _root()
        if root is None:
            raise ConfigError("memory limit: no memory controller is mounted")
        folder, name = group_folder(number), root[1]
        self._make(folder, name, str(limit_bytes), "memory limit", "measure without a limit")
        swap = {"memory.max": "0", "memory.limit_in_bytes": str(limit_bytes)}[name]
        with contextlib.suppress(OSError):  # kernels without swap accounting have no such file
            (folder / _SWAP[name]).write_text(swap)
        self._peak = folder / _PEAK[name]

    def _limit_disk(self, disk: DiskRate, number: int) -> None:
        root = _disk_root()
        if root is None:
            self._remove()
            raise ConfigError("disk limit: no controller for disks is mounted")
        folder, name, form = root
        text = form.format(device=disk.device, bytes_s=disk.bytes_s)
        folder = folder / f"fate-{number}"
        self._make(folder, name, text, "disk limit", "measure the disk as it is")

    def _make(self, folder: Path, name: str, text: str, what: str, instead: str) -> None:
        try:
            if folder not in self._folders:
                folder.mkdir()
                self._folders.append(folder)
            (folder / name).write_text(text)
        except OSError as error:
            self._remove()
            raise ConfigError(
                f"{what}: {folder / name}: {error.strerror or error}; run as root where such "
                f"control groups may be made, or {instead}"
            ) from error

    def command(self, command: list[str]) -> list[str]:
        """Wrap a command so that it starts inside."""
        files = [str(folder / "cgroup.procs") for folder in self._folders]
        return ["/bin/sh", "-c", _ENTER, "enter", *files, "--", *command]

    def peak_bytes(self) -> int | None:
        """Return the most it held, pages of files included; None where the kernel cannot say."""
        try:
            return int(self._peak.read_text()) if self._peak else None
        except (OSError, ValueError):
            return None

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(50):  # the kernel needs a moment to see that the last process is gone
            self._remove()
            if not self._folders:
                return
            time.sleep(0.1)

    def _remove(self) -> None:
        for folder in list(self._folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
                self._folders.remove(folder)


def limited(command: list[str], limit_bytes: int) -> list[str]:
    """Wrap a command so that it and its children share `limit_bytes`."""
    return [sys.executable, "-m", "fate_moe.bench.cgroup", str(limit_bytes), *command]


def _main() -> int:
    with Group(int(sys.argv[1]), os.getpid()) as group:
        return subprocess.call(group.command(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(_main())
