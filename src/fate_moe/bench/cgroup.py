"""How does a command get no more memory than it is given? (Linux cgroups, v2 or v1, needs root)

A group holds the command and its children. Pages of files that they read count, too, and leave
before the limit is broken: so a program that maps its weights slows down, and one that allocates
them is killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from fate_moe.errors import ConfigError

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")
# By the limit's name: the most it held, and the limit of swap (v1: of both together).
_PEAK = {"memory.max": "memory.peak", "memory.limit_in_bytes": "memory.max_usage_in_bytes"}
_SWAP = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}
_ENTER = 'echo $$ > "$0" && exec "$@"'


def _root() -> tuple[Path, str] | None:
    if (_V2 / "cgroup.controllers").is_file():
        return _V2, "memory.max"
    if (_V1 / "memory.limit_in_bytes").is_file():
        return _V1, "memory.limit_in_bytes"
    return None


def group_folder(number: int) -> Path:
    """Name the folder of a group; `limited` numbers it by its own process."""
    root = _root()
    return (root[0] if root else _V2) / f"fate-{number}"


def unavailable() -> str | None:
    """Say why no memory cgroup can be made, or None when one can."""
    try:
        with MemoryGroup(1 << 30, os.getpid()):
            return None
    except ConfigError as error:
        return str(error)


class MemoryGroup:
    """A group of processes that share `limit_bytes`, swap excluded. Use it in a `with` statement.

    Raises:
        ConfigError: no such group can be made here.
    """

    def __init__(self, limit_bytes: int, number: int) -> None:
        root = _root()
        if root is None:
            raise ConfigError("memory limit: no memory controller is mounted")
        self._folder, self._name = group_folder(number), root[1]
        try:
            self._folder.mkdir()
            (self._folder / self._name).write_text(str(limit_bytes))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
            raise ConfigError(
                f"memory limit: {self._folder}: {error.strerror or error}; run as root where "
                "memory cgroups may be made, or measure without a limit"
            ) from error
        swap = {"memory.max": "0", "memory.limit_in_bytes": str(limit_bytes)}[self._name]
        with contextlib.suppress(OSError):  # kernels without swap accounting have no such file
            (self._folder / _SWAP[self._name]).write_text(swap)

    def command(self, command: list[str]) -> list[str]:
        """Wrap a command so that it starts inside."""
        return ["/bin/sh", "-c", _ENTER, str(self._folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """Return the most it held, pages of files included; None where the kernel cannot say."""
        try:
            return int((self._folder / _PEAK[self._name]).read_text())
        except (OSError, ValueError):
            return None

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(50):  # the kernel needs a moment to see that the last process is gone
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def limited(command: list[str], limit_bytes: int) -> list[str]:
    """Wrap a command so that it and its children share `limit_bytes`."""
    return [sys.executable, "-m", "fate_moe.bench.cgroup", str(limit_bytes), *command]


def _main() -> int:
    with MemoryGroup(int(sys.argv[1]), os.getpid()) as group:
        return subprocess.call(group.command(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(_main())
