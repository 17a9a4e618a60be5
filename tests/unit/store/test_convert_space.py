"""Is a disk that is too small found out before anything is written, and said so that it helps?"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fate_moe.errors import StoreError
from fate_moe.store.convert import convert
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource

MIB = 1 << 20
RECORDS = 64 * MIB + 3 * (4096 + 8192)  # and what is kept in reserve
NEED = RECORDS + 3 * 4096 + 82  # headers and the rest, too


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose free space the test sets."""
    disk = SimpleNamespace(free=0, asked=[])

    def usage(path: Path) -> SimpleNamespace:
        assert path.exists()
        disk.asked.append(path)
        return disk

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return disk


def stop_in_second_layer(source: FormulaSource, out: Path) -> None:
    source.fail_at[ExpertKey(1, 0)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    source.fail_at.clear()
    source.encoded.clear()


def test_nothing_is_written_where_there_is_no_room(
    source: FormulaSource, out: Path, free: SimpleNamespace
) -> None:
    free.free = 40 * MIB
    with pytest.raises(StoreError) as caught:
        convert(source, out)
    assert str(caught.value) == (
        f"{out}.partial: not enough disk space: need 64.0 MiB more, have 40.0 MiB free; "
        "free some space, or give a store on another disk"
    )
    assert free.asked == [out.parent.parent]  # the nearest folder that exists
    assert source.encoded == []
    assert not out.parent.exists()


def test_the_records_count(source: FormulaSource, out: Path, free: SimpleNamespace) -> None:
    for free.free in (RECORDS, NEED - 1):
        with pytest.raises(StoreError, match="not enough disk space"):
            convert(source, out)
    free.free = NEED
    convert(source, out)


def test_a_finished_store_needs_no_space(
    source: FormulaSource, out: Path, free: SimpleNamespace
) -> None:
    free.free = 1 << 40
    made = convert(source, out)
    free.free = 0
    assert convert(source, out) == made


def test_what_is_there_of_an_earlier_try_needs_no_space(
    source: FormulaSource, out: Path, free: SimpleNamespace
) -> None:
    free.free = 1 << 40
    stop_in_second_layer(source, out)
    free.free = NEED - (4096 + 3 * 4096)  # the first layer is finished
    convert(source, out)
    assert verify(out).is_intact


@pytest.mark.parametrize("is_stale", [False, True])
def test_an_earlier_try_outlives_a_refusal(
    source: FormulaSource, out: Path, free: SimpleNamespace, is_stale: bool
) -> None:
    free.free = 1 << 40
    stop_in_second_layer(source, out)
    was = source.quantization
    if is_stale:
        source.quantization = {"bits": 4, "group": 32}
    free.free = MIB
    with pytest.raises(StoreError, match="not enough disk space"):
        convert(source, out)
    source.quantization = was
    free.free = 1 << 40
    convert(source, out)
    assert {key.layer for key in source.encoded} == {1}


def test_replacing_needs_room_for_both_stores(
    source: FormulaSource, out: Path, free: SimpleNamespace
) -> None:
    free.free = 1 << 40
    old = convert(source, out)
    source.quantization = {"bits": 4, "group": 32}
    free.free = NEED - 1  # with the old store's bytes it would do
    with pytest.raises(StoreError, match=r"the old store \(\d+\.\d KiB\) stays until the new one"):
        convert(source, out, force=True)
    assert read_manifest(out) == old
    assert not out.with_name("store.partial").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 72 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs Linux and root to mount a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_is_too_small(source: FormulaSource, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(20 * MIB))
    with pytest.raises(StoreError, match=r"need 64\.0 MiB more, have 52\.0 MiB free"):
        convert(source, small_disk / "store")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    convert(source, small_disk / "store")
    assert verify(small_disk / "store").is_intact


def test_a_real_disk_that_fills_up_on_the_way(source: FormulaSource, small_disk: Path) -> None:
    ballast, real = small_disk / "ballast", source.record

    def record(key: ExpertKey) -> memoryview:
        if key == ExpertKey(1, 1) and not ballast.exists():
            left = shutil.disk_usage(small_disk).free
            ballast.write_bytes(bytes(left))
        return real(key)

    source.record = record  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="the disk is full; free some space") as caught:
        convert(source, small_disk / "store", jobs=1)
    assert "\n" not in str(caught.value)
    assert not (small_disk / "store").exists()
    ballast.write_bytes(b"")
    source.encoded.clear()
    convert(source, small_disk / "store", jobs=1)
    assert verify(small_disk / "store").is_intact
    assert {key.layer for key in source.encoded} == {1}
