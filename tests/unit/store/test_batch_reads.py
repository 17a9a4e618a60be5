"""Do several reads at once deliver what single ones would, and does each fail alone?"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fate_moe import native
from fate_moe.errors import ReadError
from fate_moe.store.convert import convert
from fate_moe.store.format import Manifest
from fate_moe.store.reader import BatchReader, FileReader, RecordReader, Request
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource, formula

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(3)]
WAYS = ["plain", *(native.core().read_ways() if native.is_available() else [])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def manifest(source: FormulaSource, folder: Path) -> Manifest:
    return convert(source, folder)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def reader(
    request: pytest.FixtureRequest, way: str, folder: Path, manifest: Manifest
) -> Iterator[FileReader]:
    reader = FileReader(folder, manifest, direct=request.param, way=way)
    yield reader
    reader.close()


def slot(size: int) -> memoryview:
    """Page-aligned memory."""
    return memoryview(mmap.mmap(-1, size))


def request_for(reader: RecordReader, key: ExpertKey) -> Request:
    return Request(key, slot(reader.record_bytes(key.layer)))


@pytest.mark.skipif(os.name != "posix", reason="the native core reads through preadv")
def test_this_test_tries_native_ways() -> None:
    assert not native.is_available() or "threads" in WAYS


def test_only_the_native_core_asks_for_batches(reader: FileReader, way: str) -> None:
    assert isinstance(reader, BatchReader)
    assert (reader.batch_bytes > 0) == (way != "plain")


def test_every_record_in_any_order_and_place(reader: FileReader) -> None:
    for keys in (KEYS, KEYS[::-1], KEYS[3:4], KEYS[1::2] * 3, []):
        requests = [request_for(reader, key) for key in keys]
        assert reader.read_many(requests) == [None] * len(keys)
        for request in requests:
            assert bytes(request.buffer) == formula(request.key, len(request.buffer))


def test_neighbours_with_memory_in_one_piece(reader: FileReader) -> None:
    whole = slot(3 * 8192)
    requests = [Request(ExpertKey(1, e), whole[e * 8192 : (e + 1) * 8192]) for e in range(3)]
    assert reader.read_many(requests) == [None] * 3
    assert bytes(whole) == b"".join(formula(ExpertKey(1, e), 8192) for e in range(3))


def test_parts_and_unaligned_memory(reader: FileReader) -> None:
    key = ExpertKey(1, 2)
    odd = memoryview(bytearray(8193))[1:]
    parts = [(0, 100), (2112, None), (4096, 4096), (4095, 2)]
    requests = [Request(key, odd), *(Request(key, slot(8192), *part) for part in parts)]
    assert reader.read_many(requests) == [None] * len(requests)
    for request in requests:
        want = formula(key, 8192)[request.start :][: request.length]
        assert bytes(request.buffer[: len(want)]) == want
        assert not any(request.buffer[len(want) :])


def test_each_request_fails_alone(reader: FileReader, folder: Path) -> None:
    os.truncate(folder / "experts-00001.safetensors", 4096 + 8192 + 100)
    requests = [
        request_for(reader, ExpertKey(1, 0)),
        request_for(reader, ExpertKey(1, 1)),
        Request(ExpertKey(0, 3), slot(4096)),
        Request(ExpertKey(0, 1), slot(4096), 1, 4096),
        request_for(reader, ExpertKey(0, 2)),
        Request(ExpertKey(7, 0), slot(4096)),
    ]
    outcomes = reader.read_many(requests)
    assert [outcome is None for outcome in outcomes] == [True, False, False, False, True, False]
    assert "the file ends here" in str(outcomes[1])
    assert "the layer has 3 experts" in str(outcomes[2])
    assert "bytes 1+4096 into 4096" in str(outcomes[3])
    assert "the store has 2 MoE layers" in str(outcomes[5])
    for i in (0, 4):
        key = requests[i].key
        assert bytes(requests[i].buffer) == formula(key, reader.record_bytes(key.layer))


class Scripted:
    """Stands for the native core: brings a share of each read, then says why no more."""

    def __init__(self, real: Any, share: float, error: int) -> None:
        self._real = real
        self._share = share
        self._error = error

    def read(self, wanted: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
        less = [(fd, at, to, int(n * self._share)) for fd, at, to, n in wanted]
        return [(done, self._error) for done, _ in self._real.read(less)]


@pytest.mark.skipif(WAYS == ["plain"], reason="no native core")
@pytest.mark.parametrize(
    ("share", "error"), [(0.0, errno.EINVAL), (0.0, errno.EIO), (0.5, 0), (0.25, errno.EAGAIN)]
)
def test_what_does_not_come_in_at_once_is_read_plainly(
    share: float, error: int, folder: Path, manifest: Manifest
) -> None:
    reader = FileReader(folder, manifest, direct=False, way=WAYS[1])
    reader._reads = Scripted(reader._reads, share, error)
    requests = [request_for(reader, key) for key in KEYS]
    assert reader.read_many(requests) == [None] * len(KEYS)
    for request in requests:
        assert bytes(request.buffer) == formula(request.key, len(request.buffer))
    reader.close()


def test_verify_on_read_finds_a_flipped_byte(way: str, folder: Path, manifest: Manifest) -> None:
    path = folder / "experts-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + 8192 + 7000] ^= 1
    path.write_bytes(data)
    reader = FileReader(folder, manifest, verify_on_read=True, way=way)
    requests = [request_for(reader, key) for key in KEYS]
    requests.append(Request(ExpertKey(1, 1), slot(4096), 0, 4096))  # intact; the record is not
    outcomes = reader.read_many(requests)
    for i, outcome in enumerate(outcomes):
        if requests[i].key == (1, 1):
            assert isinstance(outcome, ReadError)
            assert "checksum" in str(outcome)
        else:
            assert outcome is None
    reader.close()


def test_a_closed_reader_refuses(reader: FileReader) -> None:
    reader.close()
    outcomes = reader.read_many([request_for(reader, key) for key in KEYS[:2]])
    assert all("closed" in str(outcome) for outcome in outcomes)


def test_close_waits_for_a_batch_under_way(way: str, folder: Path, manifest: Manifest) -> None:
    if way == "plain":
        pytest.skip("nothing is read together")
    reader = FileReader(folder, manifest, way=way)
    started, go, real = threading.Event(), threading.Event(), reader._reads

    class Slow:
        def read(self, wanted: list[tuple[int, int, int, int]]) -> Any:
            started.set()
            go.wait(10)
            return real.read(wanted)

    reader._reads = Slow()
    requests = [request_for(reader, key) for key in KEYS]
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(reader.read_many, requests)
        started.wait(10)
        closing = pool.submit(reader.close)
        assert not closing.done()
        go.set()
        assert reading.result(10) == [None] * len(KEYS)
        closing.result(10)


def test_many_threads_at_once(reader: FileReader) -> None:
    def work(_: int) -> None:
        for _ in range(20):
            requests = [request_for(reader, key) for key in KEYS]
            assert reader.read_many(requests) == [None] * len(KEYS)
            assert all(bytes(r.buffer) == formula(r.key, len(r.buffer)) for r in requests)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
