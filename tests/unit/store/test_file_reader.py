"""Does the reader deliver exactly the record's bytes, or a ReadError that says why?"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fate_moe.errors import FormatError, ReadError
from fate_moe.store.convert import convert
from fate_moe.store.format import Manifest
from fate_moe.store.layer_file import LayerFile
from fate_moe.store.reader import FileReader
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource, formula

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def manifest(source: FormulaSource, folder: Path) -> Manifest:
    return convert(source, folder)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def reader(
    request: pytest.FixtureRequest, folder: Path, manifest: Manifest
) -> Iterator[FileReader]:
    reader = FileReader(folder, manifest, direct=request.param)
    yield reader
    reader.close()


def slot(size: int) -> memoryview:
    """Page-aligned memory."""
    return memoryview(mmap.mmap(-1, size))


def test_every_record(reader: FileReader) -> None:
    for key in KEYS:
        size = reader.record_bytes(key.layer)
        for buffer in (slot(size), memoryview(bytearray(size + 1))[1:]):
            reader.read_into(key, buffer)
            assert bytes(buffer) == formula(key, size)


@pytest.mark.parametrize(("start", "length"), [(0, 100), (2112, None), (4096, 4096), (4095, 2)])
def test_parts_of_a_record(reader: FileReader, start: int, length: int | None) -> None:
    key = ExpertKey(1, 2)
    buffer = slot(8192)
    reader.read_into(key, buffer, start, length)
    want = formula(key, 8192)[start:][:length]
    assert bytes(buffer[: len(want)]) == want
    assert not any(buffer[len(want) :])


def test_direct_mode_is_used_where_it_works(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[int, int] = {}
    used = []
    real_open, real_preadv = os.open, os.preadv

    def spy_open(path: str, flag: int, *rest: int) -> int:
        fd = real_open(path, flag, *rest)
        flags[fd] = flag
        return fd

    def spy_preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        used.append(bool(flags[fd] & os.O_DIRECT))
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "preadv", spy_preadv)
    reader = FileReader(folder, manifest)
    if reader.mode != "O_DIRECT":
        pytest.skip("this file system has no O_DIRECT")
    reader.read_into(ExpertKey(0, 0), slot(4096))
    reader.read_into(ExpertKey(0, 0), slot(4096), 0, 100)
    reader.read_into(ExpertKey(0, 0), memoryview(bytearray(4097))[1:])
    assert used[0]
    assert not any(used[1:])
    reader.close()


def test_einval_falls_back_to_buffered(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = FileReader(folder, manifest)
    if reader.mode != "O_DIRECT":
        pytest.skip("this file system has no O_DIRECT")
    real, calls = os.preadv, []

    def picky(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    buffer = slot(4096)
    reader.read_into(ExpertKey(0, 1), buffer)
    assert bytes(buffer) == formula(ExpertKey(0, 1), 4096)
    assert reader.mode == "buffered"
    assert len(set(calls)) == 2
    reader.close()


@pytest.mark.parametrize("missing", ["preadv", "O_DIRECT"])
def test_platforms_without(
    missing: str, folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, missing)
    reader = FileReader(folder, manifest, direct=missing != "preadv")
    assert reader.mode == "buffered"
    with ThreadPoolExecutor(8) as pool:  # seek + read must be one step
        buffers = {key: slot(reader.record_bytes(key.layer)) for key in KEYS * 1}
        for _ in range(20):
            list(pool.map(lambda key: reader.read_into(key, buffers[key]), KEYS))
            for key, buffer in buffers.items():
                assert bytes(buffer) == formula(key, len(buffer))
    reader.close()


def test_short_reads_are_continued(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, []

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        data = os.pread(fd, 4096, offset // 4096 * 4096)
        piece = data[offset % 4096 :][:1000]
        buffers[0][: len(piece)] = piece
        return len(piece)

    buffer = memoryview(bytearray(4097))[1:]
    monkeypatch.setattr(os, "preadv", short)
    reader.read_into(ExpertKey(0, 2), buffer)
    assert bytes(buffer) == formula(ExpertKey(0, 2), 4096)
    assert len(calls) == 5
    assert real is not short


def test_a_failed_read_names_key_path_offset_and_errno(
    reader: FileReader, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ReadError, match="layer 1, expert 2") as caught:
        reader.read_into(ExpertKey(1, 2), slot(8192))
    error = caught.value
    assert error.path == str(folder / "experts-00001.safetensors")
    assert (error.key, error.offset, error.errno) == ((1, 2), 4096 + 2 * 8192, errno.EIO)


def test_a_file_cut_short_under_us_is_a_read_error(reader: FileReader, folder: Path) -> None:
    os.truncate(folder / "experts-00001.safetensors", 4096 + 8192 + 100)
    reader.read_into(ExpertKey(1, 0), slot(8192))
    with pytest.raises(ReadError, match="the file ends here"):
        reader.read_into(ExpertKey(1, 1), slot(8192))


@pytest.mark.parametrize(
    ("key", "size", "start", "length"),
    [
        (ExpertKey(2, 0), 8192, 0, None),
        (ExpertKey(-1, 0), 8192, 0, None),
        (ExpertKey(0, 3), 8192, 0, None),
        (ExpertKey(0, -1), 8192, 0, None),
        (ExpertKey(0, 0), 4095, 0, None),
        (ExpertKey(0, 0), 8192, -1, None),
        (ExpertKey(0, 0), 8192, 4096, None),
        (ExpertKey(0, 0), 8192, 1, 4096),
        (ExpertKey(0, 0), 8192, 0, 0),
        (ExpertKey(0, 0), 8192, 0, -5),
    ],
)
def test_requests_outside_of_the_record(
    reader: FileReader, key: ExpertKey, size: int, start: int, length: int | None
) -> None:
    with pytest.raises(ReadError, match=f"layer {key.layer}, expert {key.expert}"):
        reader.read_into(key, slot(size), start, length)


def test_verify_on_read_finds_a_flipped_byte_once(folder: Path, manifest: Manifest) -> None:
    path = folder / "experts-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + 8192 + 7000] ^= 1
    path.write_bytes(data)
    careless = FileReader(folder, manifest)
    careless.read_into(ExpertKey(1, 1), slot(8192))
    careful = FileReader(folder, manifest, verify_on_read=True)
    careful.read_into(ExpertKey(1, 0), slot(8192))
    for length in (None, 4096):  # the part that was asked for is intact, the record is not
        with pytest.raises(ReadError, match=r"layer 1, expert 1.*checksum"):
            careful.read_into(ExpertKey(1, 1), slot(8192), 0, length)
    careless.close()
    careful.close()


def test_verify_on_read_checks_only_the_first_read(folder: Path, manifest: Manifest) -> None:
    reader = FileReader(folder, manifest, verify_on_read=True)
    buffer = slot(4096)
    reader.read_into(ExpertKey(0, 0), buffer)
    with (folder / "experts-00000.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    reader.read_into(ExpertKey(0, 0), buffer)
    assert not any(buffer)
    reader.close()


def test_a_closed_reader_refuses(reader: FileReader) -> None:
    reader.close()
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        reader.read_into(ExpertKey(0, 0), slot(4096))


def test_close_waits_for_a_read_under_way(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = FileReader(folder, manifest)
    started, go, real = threading.Event(), threading.Event(), os.preadv

    def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        started.set()
        go.wait(10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    buffer = slot(4096)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(reader.read_into, ExpertKey(0, 0), buffer)
        started.wait(10)
        closing = pool.submit(reader.close)
        assert not closing.done()
        go.set()
        reading.result(10)
        closing.result(10)
    assert bytes(buffer) == formula(ExpertKey(0, 0), 4096)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "folder"])
def test_a_store_with_a_bad_layer_file_is_not_opened(
    folder: Path, manifest: Manifest, damage: str
) -> None:
    path = folder / "experts-00001.safetensors"
    if damage == "truncated":
        os.truncate(path, 5000)
    elif damage == "other":
        path.write_bytes((folder / "experts-00000.safetensors").read_bytes())
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(FormatError, match=r"experts-00001\.safetensors"):
        FileReader(folder, manifest)


def test_a_thread_that_is_told_to_close_while_it_holds_a_file_does(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(4096))
    file = LayerFile(path, direct=False)

    def collect() -> None:  # as the collector may do at any point of a thread
        with file._lock:
            file.close()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert file.hold(0, 0, 4096) == -1
