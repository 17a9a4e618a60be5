"""The machine card, readahead and memory groups."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fate_moe.bench import cgroup, machine, readahead
from fate_moe.bench.cgroup import DiskRate, Group
from fate_moe.bench.machine import (
    Card,
    disk_rates,
    draw_card,
    draw_limited_card,
    memory_rates,
)
from fate_moe.bench.process import run_alone
from fate_moe.errors import ConfigError


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(bytes(5 << 20))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "sda"
    (folder / "queue").mkdir(parents=True)
    (folder / "queue" / "read_ahead_kb").write_text("8192\n")
    return folder


def test_a_card_says_what_it_found(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_rates", lambda cores: {1: 1e9, 2: 3e9})
    monkeypatch.setattr(machine, "disk_rates", lambda path: {"4 MiB x 1": 5e8, "4 MiB x 4": 9e8})
    monkeypatch.setattr(machine, "both_rates", lambda path, cores: (2e9, 4e8))
    told: list[str] = []
    card = draw_card([big_file, Path(__file__)], lambda what, done, total: told.append(what))
    assert card.memory_rate == 3e9
    assert card.disk_rate == 9e8
    assert card.both_bytes_s == (2e9, 4e8)
    assert card.cores == len(os.sched_getaffinity(0))
    assert card.ram_bytes > 1 << 28
    assert card.cpu
    assert "measuring the disk" in told


def test_every_thread_reads_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[np.ndarray] = []
    monkeypatch.setattr(machine, "_READERS", (read.append,))
    rates = memory_rates(3, buffer_bytes=1 << 16)
    assert sorted(rates) == [1, 3]
    assert all(rate > 0 for rate in rates.values())
    assert sum(part.nbytes for part in read) == 2 * machine._REPEATS * (1 << 16)


def test_the_real_readers_read() -> None:
    assert memory_rates(1, buffer_bytes=1 << 22)[1] > 1e7


def test_disk_rates_by_block_and_depth(big_file: Path) -> None:
    rates = disk_rates(big_file, seconds=0.05)
    if not rates:
        pytest.skip("no O_DIRECT on this file system")
    assert set(rates) == {"4 MiB x 1", "4 MiB x 4", "64 KiB x 1", "64 KiB x 4"}
    assert all(rate > 1e5 for rate in rates.values())


def test_memory_and_disk_at_once(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEMORY_BUFFER_BYTES", 1 << 22)
    if not disk_rates(big_file, seconds=0.01):
        pytest.skip("no O_DIRECT on this file system")
    memory, disk = machine.both_rates(big_file, 2, seconds=0.05)
    assert memory > 1e7
    assert disk > 1e5


def test_a_file_smaller_than_a_block_is_not_read_in_such_blocks(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(100_000))
    assert not [name for name in disk_rates(path, seconds=0.01) if name.startswith("4 MiB")]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent: cannot be read: No such file"):
        disk_rates(tmp_path / "absent")


def test_without_o_direct_there_is_no_rate() -> None:
    card = Card("x", 1, (), 1, "Linux", 0.0, {1: 1.0}, "", None, {})
    assert card.disk_rate is None


def test_readahead_is_put_back(disk: Path) -> None:
    found: list[int | None] = []

    def fail() -> None:
        with readahead.reading_ahead(disk, 128):
            found.append(readahead.read_kib(disk))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [128]
    assert readahead.read_kib(disk) == 8192


def test_readahead_is_left_alone(disk: Path) -> None:
    with readahead.reading_ahead(disk, None), readahead.reading_ahead(None, 4):
        assert readahead.read_kib(disk) == 8192


def test_why_readahead_is_fixed(disk: Path, tmp_path: Path) -> None:
    assert readahead.why_fixed(disk) is None
    assert "cannot be written" in (readahead.why_fixed(tmp_path / "none") or "")
    assert "no disk" in (readahead.why_fixed(None) or "")


def test_readahead_that_cannot_be_set_is_one_line(tmp_path: Path) -> None:
    context = readahead.reading_ahead(tmp_path / "none", 4)
    with pytest.raises(ConfigError, match="readahead: .*No such file"):
        context.__enter__()


@pytest.mark.parametrize("text", ["", "128,", "x", "-1", "9999999999"])
def test_what_is_no_list_of_kib_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="need numbers of KiB"):
        readahead.parse_kib(text)


def test_lists_of_kib() -> None:
    assert readahead.parse_kib("128, 8192") == [128, 8192]


def test_no_rights_to_make_a_group_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(cgroup, "_V2", tmp_path / "gone")
    monkeypatch.setattr(cgroup, "_V1", tmp_path / "gone")
    assert cgroup.unavailable() == "memory limit: no memory controller is mounted"
    monkeypatch.setattr(cgroup, "_V2", tmp_path)
    monkeypatch.setattr(Path, "mkdir", _refuse)
    assert "Permission denied; run as root" in (cgroup.unavailable() or "")


def _refuse(self: Path) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_group_limits_what_is_inside() -> None:
    if reason := cgroup.unavailable():
        pytest.skip(reason)
    hungry = [sys.executable, "-c", "bytearray(200 << 20)"]
    assert subprocess.run(cgroup.limited(hungry, 1 << 30), check=False).returncode == 0
    assert subprocess.run(cgroup.limited(hungry, 64 << 20), check=False).returncode != 0
    with cgroup.Group(1 << 30, os.getpid()) as group:
        folder = cgroup.group_folder(os.getpid())
        assert folder.is_dir()
        subprocess.run(group.command(hungry), check=True)
        assert (group.peak_bytes() or 0) > 150 << 20
    assert not folder.exists()


def rate_of(path: Path, bytes_s: int) -> DiskRate:
    """Hold the disk of `path` to a rate, or skip the test where none can be held."""
    folder = readahead.disk_of(path)
    if folder is None:
        pytest.skip("no disk here")
    rate = DiskRate(readahead.device_of(folder), bytes_s)
    if reason := cgroup.unavailable(None, rate):
        pytest.skip(reason)
    return rate


READ = """
import os, sys, time, mmap
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer, began = mmap.mmap(-1, 1 << 20), time.perf_counter()
for place in range(0, 5 << 20, 1 << 20):
    os.preadv(file, [buffer], place)
print(time.perf_counter() - began)
"""


def test_a_group_holds_the_disk_to_a_rate(big_file: Path) -> None:
    if not disk_rates(big_file, seconds=0.01):
        pytest.skip("no O_DIRECT on this file system")
    command = [sys.executable, "-c", READ, str(big_file)]
    rate = rate_of(big_file, 8 << 20)
    for limit_bytes in (None, 1 << 30):  # alone, and beside a limit of memory
        done = run_alone(command, limit_bytes, 60, rate)
        assert float(done.stdout) > 0.4, done
        assert (done.peak_bytes is None) == (limit_bytes is None)


def test_a_card_of_a_limited_disk(big_file: Path) -> None:
    rate = rate_of(big_file, 64 << 20)
    card = draw_limited_card([big_file], rate)
    assert card.disk_limit_bytes_s == 64 << 20
    assert all(0 < have < 96 << 20 for have in card.disk_bytes_s.values())
    assert card.cores == len(os.sched_getaffinity(0))
    assert sorted(card.memory_bytes_s) == sorted({1, card.cores})


def test_a_machine_that_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="machine: it could not be measured: .*absent"):
        draw_limited_card([tmp_path / "absent"], rate_of(tmp_path, 1 << 20))


def test_both_limits_in_one_group_of_version_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(cgroup, "_V2", tmp_path)
    group = Group(1 << 30, 7, DiskRate("254:0", 1000))
    assert (tmp_path / "fate-7" / "io.max").read_text() == "254:0 rbps=1000"
    assert (tmp_path / "fate-7" / "memory.max").read_text() == str(1 << 30)
    assert group.command(["true"])[4:] == [str(tmp_path / "fate-7" / "cgroup.procs"), "--", "true"]


def test_a_disk_that_cannot_be_limited_leaves_nothing(tmp_path: Path) -> None:
    if reason := cgroup.unavailable():
        pytest.skip(reason)
    with pytest.raises(ConfigError, match="disk limit: .*(or measure the disk as it is|mounted)"):
        Group(1 << 30, os.getpid(), DiskRate("0:0", 1000))
    assert not cgroup.group_folder(os.getpid()).exists()


def test_a_disk_without_numbers_is_one_line(disk: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        readahead.device_of(disk)
