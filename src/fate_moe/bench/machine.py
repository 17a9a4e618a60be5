"""What can this machine do at most, on which every speed depends?

The machine card: processor, memory and disk, and how fast the last two deliver. Measured, because
a virtual machine says little about what is under it. Beside it, how busy the machine was with
other work.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from fate_moe.bench.cgroup import DiskRate
from fate_moe.bench.process import run_alone
from fate_moe.bench.readahead import disk_of, read_kib
from fate_moe.errors import ConfigError
from fate_moe.memory.arena import HUGE_PAGE, Arena
from fate_moe.types import Progress, no_progress

MEMORY_BUFFER_BYTES = 1 << 30
DISK_BLOCKS = {"4 MiB": 4 << 20, "64 KiB": 64 << 10}
DISK_DEPTHS = (1, 4)
_PAGE = 4096
_REPEATS = 5
_DISK_SECONDS = 1.0
_CARD_SECONDS = 300.0  # more than a card ever takes
_CPUINFO = Path("/proc/cpuinfo")
# What kernels for quantized weights are written for.
_ISA = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Card:
    """One machine, as it was when a measurement began.

    Attributes:
        cpu, cores, isa: model, usable cores, instruction sets that matter here.
        ram_bytes, kernel: installed memory; operating system and its version.
        load_average: over one minute, before anything was measured.
        memory_bytes_s: threads -> bytes read per second from memory.
        disk: name of the block device that holds the models; "" where it has none.
        readahead_kib: of that disk; None where unknown.
        disk_bytes_s: "4 MiB x 1": block and reads side by side -> bytes per second, O_DIRECT;
            empty where the file system does not take such reads.
        both_bytes_s: bytes per second from memory and from disk when both are read at once, by all
            cores and one reader; None where the disk was not measured. The reader of a virtual
            disk can be the very cores that compute.
        disk_limit_bytes_s: what the disk was held to for every program; None: it was not.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    ram_bytes: int
    kernel: str
    load_average: float
    memory_bytes_s: Mapping[int, float]
    disk: str
    readahead_kib: int | None
    disk_bytes_s: Mapping[str, float]
    both_bytes_s: tuple[float, float] | None = None
    disk_limit_bytes_s: int | None = None

    @property
    def memory_rate(self) -> float:
        """The best that memory gave, bytes/s."""
        return max(self.memory_bytes_s.values())

    @property
    def disk_rate(self) -> float | None:
        """The best that the disk gave, bytes/s; None where it was not measured."""
        return max(self.disk_bytes_s.values(), default=None)


def draw_card(files: Sequence[Path], progress: Progress = no_progress) -> Card:
    """Measure this machine; takes about ten seconds and 1 GiB of memory.

    Args:
        files: on the disk in question; the largest is read from.
    Raises:
        ConfigError: a file cannot be read.
    """
    load = os.getloadavg()[0]  # before our own work counts
    progress("measuring memory", 0, 1)
    memory = memory_rates(usable_cores())
    progress("measuring memory", 1, 1)
    progress("measuring the disk", 0, 1)
    largest = max(files, key=lambda path: path.stat().st_size)
    disk = disk_rates(largest)
    both = both_rates(largest, usable_cores()) if disk else None
    progress("measuring the disk", 1, 1)
    device = disk_of(largest)
    cpu, isa = _processor()
    return Card(
        cpu=cpu,
        cores=usable_cores(),
        isa=isa,
        ram_bytes=int(psutil.virtual_memory().total),
        kernel=f"{platform.system()} {platform.release()}",
        load_average=round(load, 2),
        memory_bytes_s=memory,
        disk=device.name if device else "",
        readahead_kib=read_kib(device) if device else None,
        disk_bytes_s=disk,
        both_bytes_s=both,
    )


def draw_limited_card(
    files: Sequence[Path], disk: DiskRate, progress: Progress = no_progress
) -> Card:
    """Measure this machine with its disk held to a rate, in a process of its own.

    Raises:
        ConfigError: as `draw_card`; or the disk cannot be limited.
    """
    progress("measuring memory and the limited disk", 0, 1)
    command = [sys.executable, "-m", "fate_moe.bench.machine", *map(os.fspath, files)]
    done = run_alone(command, None, _CARD_SECONDS, disk)
    progress("measuring memory and the limited disk", 1, 1)
    if done.code != 0:
        why = "".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.code}"
        raise ConfigError(f"machine: it could not be measured: {why}")
    return replace(_read_card(done.stdout), disk_limit_bytes_s=disk.bytes_s)


def _read_card(text: str) -> Card:
    fields = json.loads(text)
    fields["isa"] = tuple(fields["isa"])
    fields["memory_bytes_s"] = {int(k): rate for k, rate in fields["memory_bytes_s"].items()}
    fields["both_bytes_s"] = fields["both_bytes_s"] and tuple(fields["both_bytes_s"])
    return Card(**fields)


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_rates(cores: int, buffer_bytes: int = MEMORY_BUFFER_BYTES) -> dict[int, float]:
    """Measure how fast memory is read by one thread and by all, bytes/s, the best of several."""
    buffer = np.ones(buffer_bytes // 8, dtype=np.int64)
    return {threads: _memory_rate(buffer, threads) for threads in sorted({1, cores})}


def _memory_rate(buffer: NDArray[np.int64], threads: int) -> float:
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            for read in _READERS:
                began_s = time.perf_counter()
                list(pool.map(read, parts))
                best = min(best, time.perf_counter() - began_s)
    return buffer.nbytes / best


def _by_numpy(part: NDArray[np.int64]) -> None:
    part.view(np.int8).max()


def _by_torch(part: NDArray[np.int64]) -> None:
    import torch

    torch.from_numpy(part.view(np.int32)).sum(dtype=torch.int32)


# Ways to read a buffer once without the interpreter's lock; which is fastest differs by machine.
_READERS: tuple[Callable[[NDArray[np.int64]], None], ...] = (_by_numpy, _by_torch)


def disk_rates(path: Path, seconds: float = _DISK_SECONDS) -> dict[str, float]:
    """Measure random O_DIRECT reads of a file, bytes/s by block and reads side by side.

    Raises:
        ConfigError: the file cannot be read.
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        return {}
    try:
        descriptor = os.open(path, os.O_RDONLY | direct)
    except OSError as error:
        if path.is_file() and os.access(path, os.R_OK):
            return {}  # a file system in memory, say
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    size = path.stat().st_size
    try:
        return {
            f"{name} x {depth}": _disk_rate(descriptor, size, block, depth, seconds)
            for name, block in DISK_BLOCKS.items()
            if size >= block
            for depth in DISK_DEPTHS
        }
    except OSError:
        return {}
    finally:
        os.close(descriptor)


def both_rates(path: Path, cores: int, seconds: float = _DISK_SECONDS) -> tuple[float, float]:
    """Measure memory and disk while both are read: all cores, and one O_DIRECT reader.

    Returns:
        Bytes per second from memory, and from the disk.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    parts = np.array_split(np.ones(MEMORY_BUFFER_BYTES // 8, dtype=np.int64), cores)
    end_s = time.perf_counter() + seconds

    def read(part: NDArray[np.int64]) -> int:
        done = 0
        while time.perf_counter() < end_s:
            _by_torch(part)
            done += part.nbytes
        return done

    began_s = time.perf_counter()
    block = min(DISK_BLOCKS["4 MiB"], path.stat().st_size // _PAGE * _PAGE)
    try:
        with ThreadPoolExecutor(cores + 1) as pool:
            reader = pool.submit(_disk_rate, descriptor, path.stat().st_size, block, 1, seconds)
            memory = sum(pool.map(read, parts)) / (time.perf_counter() - began_s)
            return memory, reader.result()
    finally:
        os.close(descriptor)


def _disk_rate(descriptor: int, size: int, block: int, depth: int, seconds: float) -> float:
    # Into the engine's own kind of memory: into small pages a virtual disk reads at half the speed.
    arena = Arena(depth, max(block, HUGE_PAGE))
    end_s = time.perf_counter() + seconds

    def read(slot: int) -> int:
        places, done = random.Random(slot), 0
        buffer = arena.view(slot)[:block]
        while time.perf_counter() < end_s:
            place = places.randrange((size - block) // _PAGE + 1) * _PAGE
            done += os.preadv(descriptor, [buffer], place)
        return done

    began_s = time.perf_counter()
    with ThreadPoolExecutor(depth) as pool:
        total = sum(pool.map(read, range(depth)))
    return total / (time.perf_counter() - began_s)


def _processor() -> tuple[str, tuple[str, ...]]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), ()
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return (
        name.group(1).strip() if name else platform.machine(),
        tuple(flag for flag in _ISA if flag in flags),
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(draw_card([Path(name) for name in sys.argv[1:]]))) + "\n")
