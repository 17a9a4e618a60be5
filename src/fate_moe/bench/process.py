"""What comes of one program, run alone within a limit of memory and of time?"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fate_moe.bench.cgroup import DiskRate, Group

_MOST_OUTPUT = 1 << 20
_BLOCK_BYTES = 512  # of ru_inblock


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        is_late: it took too long and was ended.
        stdout, stderr: the last of what it printed.
        wall_s: from start to end, loading included.
        read_bytes: what it read from disk, by the system's count.
        peak_bytes: the most that its memory group held, pages of files included; None without one.
    """

    code: int
    is_late: bool
    stdout: str
    stderr: str
    wall_s: float
    read_bytes: int
    peak_bytes: int | None


def run_alone(
    command: Sequence[str],
    limit_bytes: int | None,
    seconds: float,
    disk: DiskRate | None = None,
) -> Done:
    """Run a program to its end, or end it and all that it started.

    Args:
        limit_bytes: memory for all of it; None: no limit.
        seconds: until it is ended.
        disk: how fast it may read; None: no limit.
    Raises:
        ConfigError: no such group can be made here.
        OSError: the program cannot be started.
    """
    if limit_bytes is None and disk is None:
        return _run(list(command), seconds, None)
    with Group(limit_bytes, os.getpid(), disk) as group:
        return _run(group.command(list(command)), seconds, group)


def _run(command: list[str], seconds: float, group: Group | None) -> Done:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    began_s = time.perf_counter()
    is_late = False
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # A session of its own: its number ends the program with all that it started.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        wall_s = time.perf_counter() - began_s
        read = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before
        peak = group.peak_bytes() if group else None
        return Done(
            process.returncode, is_late, _tail(out), _tail(err), wall_s, read * _BLOCK_BYTES, peak
        )


@contextlib.contextmanager
def ending_tidily() -> Iterator[None]:
    """Within the scope, a request to end is an interrupt: what was set is put back on the way out.

    Only the main thread is ever asked.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def forget_files(paths: Iterable[Path]) -> None:
    """Drop the pages of files from memory, so that a limited program has to read them itself."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # only what is on disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MOST_OUTPUT))
    return file.read().decode(errors="replace")
