"""Reads that go on by themselves: each is reported once, with its bytes or its failure."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fate_moe import native
from fate_moe.errors import ReadError
from fate_moe.store.background import Landed
from fate_moe.store.convert import convert
from fate_moe.store.format import read_manifest
from fate_moe.store.layer_file import LayerFile
from fate_moe.store.reader import BackgroundReader, FileReader, Request
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource, formula
from tests.unit.store.test_batch_reads import KEYS, slot

WAYS = native.core().read_ways() if native.is_available() else []
pytestmark = pytest.mark.skipif(not WAYS, reason="needs the native core")


@pytest.fixture
def folder(tmp_path: Path, source: FormulaSource) -> Path:
    convert(source, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(params=WAYS)
def reader(request: pytest.FixtureRequest, folder: Path) -> Iterator[FileReader]:
    made = FileReader(folder, read_manifest(folder), way=request.param, verify_on_read=True)
    yield made
    made.close()


@pytest.fixture
def unchecked(folder: Path) -> Iterator[FileReader]:
    """A reader that leaves checksums alone."""
    made = FileReader(folder, read_manifest(folder))
    yield made
    made.close()


def requests_for(reader: FileReader, keys: list[ExpertKey]) -> list[Request]:
    return [Request(key, slot(reader.record_bytes(key.layer))) for key in keys]


def collect(reader: BackgroundReader, count: int) -> dict[ExpertKey, Landed]:
    found: dict[ExpertKey, Landed] = {}
    while len(found) < count:
        assert reader.wait(10)
        for one in reader.landed():
            assert one.key not in found
            found[one.key] = one
    assert not reader.wait(0.01)
    return found


def test_every_record_lands_once_and_whole(reader: FileReader) -> None:
    assert isinstance(reader, BackgroundReader)
    assert not reader.wait(0.01)
    assert reader.landed() == []
    for keys in (KEYS, KEYS[::-1], KEYS[2:3]):
        requests = requests_for(reader, keys)
        reader.start(requests)
        found = collect(reader, len(keys))
        assert [found[key].failure for key in keys] == [None] * len(keys)
        assert all(0 <= one.ago_s < 10 for one in found.values())
        for request in requests:
            assert bytes(request.buffer) == formula(request.key, len(request.buffer))


def test_each_fails_alone(reader: FileReader, folder: Path) -> None:
    damaged = ExpertKey(1, 2)
    entry = reader._layers[1]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.offset(2))
        file.write(b"\xff" * 64)
    reader.start([*requests_for(reader, KEYS), Request(ExpertKey(9, 0), slot(8192))])
    found = collect(reader, len(KEYS) + 1)
    failed = {key: str(one.failure) for key, one in found.items() if one.failure is not None}
    assert failed.keys() == {damaged, ExpertKey(9, 0)}
    assert "checksum" in failed[damaged]
    assert "the store has 2 MoE layers" in failed[ExpertKey(9, 0)]


def test_what_the_core_could_not_read_is_read_again_and_then_fails(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(key: ExpertKey, offset: int, target: memoryview) -> None:
        raise ReadError(key, "here", offset, errno.EIO, "injected")

    reader.start([])  # makes the background
    background = reader._background
    assert background is not None
    real = background._courier

    class Nothing:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def landed(self) -> list[tuple[Request, int, float]]:
            return [(one[0], len(one[0].buffer), one[2]) for one in real.landed()]

    monkeypatch.setattr(background, "_courier", Nothing())
    requests = requests_for(reader, KEYS[:2])
    reader.start(requests)
    assert all(one.failure is None for one in collect(reader, 2).values())
    assert bytes(requests[0].buffer) == formula(KEYS[0], len(requests[0].buffer))
    for file in reader._files:
        monkeypatch.setattr(file, "read", broken)
    reader.start(requests)
    assert all("injected" in str(one.failure) for one in collect(reader, 2).values())


def test_what_does_not_fit_a_record_is_refused_with_the_reason(unchecked: FileReader) -> None:
    key, size = KEYS[0], unchecked.record_bytes(KEYS[0].layer)
    for request, why in (
        (Request(key._replace(expert=99), slot(size)), "the layer has"),
        (Request(key._replace(expert=-1), slot(size)), "the layer has"),
        (Request(key._replace(layer=-1), slot(size)), "the store has 2 MoE layers"),
        (Request(key, slot(2 * size), 0, size + 1), f"bytes 0+{size + 1} into"),
        (Request(key, slot(size), -1, 1), "bytes -1+1 into"),
        (Request(key, slot(size), 0, 0), "bytes 0+0 into"),
        (Request(key, slot(size)[:-1], 0, size), f"into {size - 1} of a {size} byte record"),
    ):
        unchecked.start([request, *requests_for(unchecked, KEYS[1:2])])
        found = collect(unchecked, 2)
        assert why in str(found[request.key].failure)
        assert found[KEYS[1]].failure is None
    with pytest.raises(BufferError):
        unchecked.start([Request(key, memoryview(bytes(size)))])
    assert not unchecked.wait(0.01)


def test_a_record_that_is_asked_for_twice_comes_in_twice(unchecked: FileReader) -> None:
    (first,), (second,) = requests_for(unchecked, KEYS[:1]), requests_for(unchecked, KEYS[:1])
    unchecked.start([first, second])
    landed: list[Landed] = []
    while len(landed) < 2:
        assert unchecked.wait(10)
        landed += unchecked.landed()
    assert [one.failure for one in landed] == [None, None]
    assert bytes(first.buffer) == bytes(second.buffer) == formula(KEYS[0], len(first.buffer))


def test_memory_is_held_until_its_read_is_over(unchecked: FileReader) -> None:
    (request,) = requests_for(unchecked, KEYS[:1])
    unchecked.start([request])
    with pytest.raises(BufferError):
        request.buffer.release()
    collect(unchecked, 1)
    request.buffer.release()


def test_direct_reads_are_of_whole_pages_and_of_files_that_take_them(tmp_path: Path) -> None:
    page = 4096
    path = tmp_path / "records"
    path.write_bytes(bytes(range(256)) * (4 * page // 256))
    with path.open("rb") as file, path.open("ab") as unreadable:
        files = [(unreadable.fileno(), file.fileno(), page, page, 2)]
        courier = native.core().RecordCourier(WAYS[0], 4, page, files)

        def missing(start: int, length: int) -> int:
            request = Request(ExpertKey(0, 1), slot(page), start, length)
            assert not courier.start([request])
            assert courier.wait(10)
            ((landed, count, _),) = courier.landed()
            assert landed is request
            return int(count)

        assert missing(0, page) == page  # from the descriptor that cannot be read
        assert missing(0, page - 512) == missing(512, page - 512) == 0
        courier.buffer(0)
        assert missing(0, page) == 0
        courier.close()


def test_parts_of_records_come_in_where_they_belong(reader: FileReader) -> None:
    key, size = KEYS[0], reader.record_bytes(KEYS[0].layer)
    buffer = slot(size)
    for start, length in ((0, 1024), (1024, 1), (1025, size - 1025)):
        reader.start([Request(key, buffer[start : start + length], start, length)])
        assert collect(reader, 1)[key].failure is None
    assert bytes(buffer) == formula(key, size)


def test_a_file_that_takes_no_direct_reads_is_read_through_the_page_cache(
    unchecked: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked.start([])
    background = unchecked._background
    assert background is not None
    real, buffered = background._courier, list[int]()

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def landed(self) -> list[tuple[Request, int, float]]:
            return [(one, len(one.buffer), ago_s) for one, _, ago_s in real.landed()]

        def buffer(self, layer: int) -> None:
            buffered.append(layer)
            real.buffer(layer)

    monkeypatch.setattr(background, "_courier", Refusing())
    file = unchecked._files[0]
    read_all = file._read_all

    def found_out(key: ExpertKey, offset: int, target: memoryview) -> None:
        file.is_direct = False  # as when the system refuses a direct read
        read_all(key, offset, target)

    monkeypatch.setattr(file, "_read_all", found_out)
    (request,) = requests_for(unchecked, [ExpertKey(0, 1)])
    unchecked.start([request])
    assert collect(unchecked, 1)[request.key].failure is None
    assert bytes(request.buffer) == formula(request.key, len(request.buffer))
    assert buffered == [0]


def test_a_reader_closed_while_it_looks_up_descriptors_reads_nothing(unchecked: FileReader) -> None:
    others: list[int] = []

    class Closing(LayerFile):
        @property
        def descriptors(self) -> tuple[int, int]:
            found = super().descriptors
            if not others:
                unchecked.close()  # as the collector may at any time
                others.extend(os.open(self.path, os.O_RDONLY) for _ in range(8))  # the numbers anew
            return found

    for file in unchecked._files:
        file.__class__ = Closing
    unchecked.start(requests_for(unchecked, KEYS[:1]))
    found = collect(unchecked, 1)
    for other in others:
        os.close(other)
    assert "the store is closed" in str(found[KEYS[0]].failure)


def test_what_is_withdrawn_is_not_reported(reader: FileReader) -> None:
    for _ in range(20):
        reader.start(requests_for(reader, KEYS))
        gone = {key for key in KEYS[::-1] if reader.withdraw(key)}
        assert collect(reader, len(KEYS) - len(gone)).keys() == set(KEYS) - gone
        assert not any(reader.withdraw(key) for key in KEYS)


def test_nothing_is_written_or_reported_after_forget(reader: FileReader) -> None:
    requests = requests_for(reader, KEYS)
    reader.start([*requests, Request(ExpertKey(9, 0), slot(8192))])
    reader.forget()
    before = [bytes(request.buffer) for request in requests]
    time.sleep(0.01)
    assert [bytes(request.buffer) for request in requests] == before
    assert reader.landed() == []
    reader.start(requests)
    assert collect(reader, len(KEYS)).keys() == set(KEYS)


def test_a_closed_store_says_so(reader: FileReader) -> None:
    reader.start(requests_for(reader, KEYS))
    reader.close()
    assert reader.landed() == []
    reader.start(requests_for(reader, KEYS[:1]))
    assert "the store is closed" in str(collect(reader, 1)[KEYS[0]].failure)
