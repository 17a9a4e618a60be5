"""How do the bytes of one record get from disk into a slot?

Positional reads into memory the caller owns; no copy, no cache of our own. O_DIRECT where offset,
length and address are 4096-aligned and the file system takes it, so that expert bytes are not kept
twice (slot and page cache); buffered elsewhere, also where the platform has neither. Several small
records come in with one call of the native core (csrc/io.h), where it is there.

Invariants: a read either fills the buffer or gives a ReadError; any thread may call; layer files
are opened once and checked against the manifest before the first read. Knows no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from fate_moe import native
from fate_moe.errors import FormatError, ReadError
from fate_moe.store.background import Background, Landed
from fate_moe.store.format import LayerEntry, Manifest, record_name
from fate_moe.store.header import read_header
from fate_moe.store.layer_file import LayerFile, address_of
from fate_moe.types import ExpertKey

Mode = Literal["O_DIRECT", "buffered", "pinned"]
"""From disk past the page cache, from disk, or from memory that a GPU copies from."""

_DEPTH = 64  # reads under way in one call of the native core
TOGETHER_BYTES = 128 << 10
"""Of background reads at most so many are under way at once: what a demand waits behind."""
_BATCH_BYTES = 1 << 20  # from here on a disk is as fast with single reads, which land one by one


class Place(NamedTuple):
    """Where the bytes of one read are, and where they go."""

    key: ExpertKey
    file: LayerFile
    offset: int  # in the file
    target: memoryview
    address: int  # of the target


class RecordReader(Protocol):
    """Reads records; what the mover knows of the store."""

    @property
    def mode(self) -> Mode:
        """How the bytes come in, for reports."""
        ...

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        ...

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        """Fill buffer[:length] with record[start : start + length].

        Args:
            key: which record.
            buffer: writable, contiguous, at least `length` bytes.
            start: first byte of the record to read.
            length: how many bytes; the rest of the record if None.
        Raises:
            ReadError: the bytes could not be read or fail their checksum.
        """
        ...

    def close(self) -> None:
        """Give back the files; later reads raise ReadError."""
        ...


class Request(NamedTuple):
    """One read among several: fill buffer[:length] with record[start : start + length]."""

    key: ExpertKey
    buffer: memoryview
    start: int = 0
    length: int | None = None
    urgent: bool = True  # someone waits for it


@runtime_checkable
class BatchReader(RecordReader, Protocol):
    """A RecordReader that is quicker with several small records at once."""

    @property
    def batch_bytes(self) -> int:
        """Most bytes that gain from being asked for together; 0 = none do."""
        ...

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Do all requests; returns what each would have raised from `read_into`, in order."""
        ...


@runtime_checkable
class BackgroundReader(BatchReader, Protocol):
    """A BatchReader whose small reads can go on while its caller does something else.

    One thread at a time may call what is named here; at most one read of a record is under way.
    """

    @property
    def any_size(self) -> bool:
        """Whether all reads, also large ones, are best left to go on by themselves."""
        ...

    def start(self, requests: Sequence[Request]) -> None:
        """Begin reads; returns at once, needs `any_size` or `batch_bytes` > 0."""
        ...

    def promote(self, key: ExpertKey) -> None:
        """Note that someone waits for a read that began as a guess, if it is under way."""
        ...

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a read back that has not begun; False when it has: it will be reported."""
        ...

    def landed(self) -> list[Landed]:
        """Return what came in, or failed, since the last call."""
        ...

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; False after `most_s` or without a read."""
        ...

    def forget(self) -> None:
        """Take back what has not begun and wait for what has; `landed` reports none of it."""
        ...


class FileReader:
    """A BackgroundReader over the layer files of a store folder.

    Attributes:
        any_size: never: a large read is as quick by a thread that waits for it.

    Args:
        folder: the store.
        manifest: its manifest.
        direct: try O_DIRECT.
        verify_on_read: check each record's checksum when it is read for the first time.
        way: how batches are read, one of the native core's `read_ways` or "plain", one after the
            other; None = the best there is.
    Raises:
        FormatError: a layer file is missing or is not what the manifest says.
    """

    any_size = False

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        direct: bool = True,
        verify_on_read: bool = False,
        way: str | None = None,
    ) -> None:
        self._layers = manifest.layers
        self._way = _choose_way(way)
        self._reads = None if self._way is None else native.core().open_reads(self._way, _DEPTH)
        self._background: Background | None = (
            None  # has a thread of its own, so not before it is used
        )
        self._is_closed = False
        self._verify_on_read = verify_on_read
        self._verified: set[ExpertKey] = set()
        self._files: list[LayerFile] = []
        try:
            for entry in manifest.layers:
                check_layer_file(folder / entry.file, entry)
                self._files.append(LayerFile(folder / entry.file, direct))
        except OSError as error:
            self.close()
            raise FormatError(f"{entry.file}: cannot be opened: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def mode(self) -> Mode:
        """ "O_DIRECT" while every layer file is read that way, else "buffered"."""
        return "O_DIRECT" if all(file.is_direct for file in self._files) else "buffered"

    def record_bytes(self, layer: int) -> int:
        """Bytes of one record of MoE layer `layer`."""
        return self._layers[layer].record_bytes

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        """Fill buffer[:length] with record[start : start + length]; see RecordReader."""
        self._finish(self._place(key, buffer, start, length), 0)

    @property
    def batch_bytes(self) -> int:
        """Most bytes that gain from being asked for together; 0 without the native core."""
        return 0 if self._reads is None else _BATCH_BYTES

    def read_many(self, requests: Sequence[Request]) -> list[ReadError | None]:
        """Do all requests; returns what each would have raised from `read_into`, in order."""
        outcomes: list[ReadError | None] = [None] * len(requests)
        places: dict[int, Place] = {}
        for i, request in enumerate(requests):
            try:
                places[i] = self._place(request.key, request.buffer, request.start, request.length)
            except ReadError as error:
                outcomes[i] = error
        counts = self._read_together(list(places.values()))
        for (i, place), done in zip(places.items(), counts, strict=True):
            try:
                self._finish(place, done)
            except ReadError as error:
                outcomes[i] = error
        return outcomes

    def start(self, requests: Sequence[Request]) -> None:
        """Begin reads that go on by themselves; see BackgroundReader."""
        if self._background is None:
            files = [
                (*file.descriptors, entry.first_offset, entry.record_bytes, entry.num_experts)
                for file, entry in zip(self._files, self._layers, strict=True)
            ]
            courier = native.core().RecordCourier(self._way, _DEPTH, TOGETHER_BYTES, files)
            self._background = Background(courier, self._finish_request, self._verify_on_read)
            if self._is_closed:  # by the collector, while descriptors were looked up
                self._background.close()
        self._background.start(requests)

    def promote(self, key: ExpertKey) -> None:
        """Change nothing: few small reads are ahead of it."""

    def withdraw(self, key: ExpertKey) -> bool:
        """Take a read back that has not begun; see BackgroundReader."""
        return self._background is not None and self._background.withdraw(key)

    def landed(self) -> list[Landed]:
        """Return what came in, or failed, since the last call."""
        return [] if self._background is None else self._background.landed()

    def wait(self, most_s: float) -> bool:
        """Wait until `landed` has something to say; see BackgroundReader."""
        return self._background is not None and self._background.wait(most_s)

    def forget(self) -> None:
        """Take back what has not begun and wait for what has; see BackgroundReader."""
        if self._background is not None:
            self._background.forget()

    def close(self) -> None:
        """Close the files; reads that are under way finish first."""
        self._is_closed = True
        if self._background is not None:
            self._background.close()
        for file in self._files:
            file.close()

    def _place(self, key: ExpertKey, buffer: memoryview, start: int, length: int | None) -> Place:
        if not (0 <= key.layer < len(self._files)):
            raise ReadError(key, "store", 0, None, f"the store has {len(self._files)} MoE layers")
        entry, file = self._layers[key.layer], self._files[key.layer]
        if not 0 <= key.expert < entry.num_experts:
            raise ReadError(key, file.path, 0, None, f"the layer has {entry.num_experts} experts")
        length = entry.record_bytes - start if length is None else length
        target = buffer.cast("B") if buffer.format != "B" else buffer
        if not (start >= 0 and 0 < length <= entry.record_bytes - start and len(target) >= length):
            raise ReadError(
                key, file.path, entry.offset(key.expert), None,
                f"bytes {start}+{length} into {len(target)} of a {entry.record_bytes} byte record",
            )  # fmt: skip
        target = target[:length]
        return Place(key, file, entry.offset(key.expert) + start, target, address_of(target))

    def _read_together(self, places: Sequence[Place]) -> list[int]:
        """Return how many bytes of each came in; what is missing is left to the plain way."""
        if self._reads is None:
            return [0] * len(places)
        held: list[LayerFile] = []
        try:
            wanted = []
            for place in places:
                length = len(place.target)
                fd = place.file.hold(place.offset, place.address, length)
                if fd < 0:
                    return [0] * len(places)
                held.append(place.file)
                wanted.append((fd, place.offset, place.address, length))
            return [done for done, _ in self._reads.read(wanted)]
        finally:
            for file in held:
                file.let_go()

    def _finish_request(self, request: Request, missing: int) -> None:
        """Read the last bytes of a request, all of them if it could not begin."""
        key = request.key
        place = self._place(key, request.buffer, request.start, request.length)
        self._finish(place, 0 if missing < 0 else len(place.target) - missing)
        if missing and not place.file.is_direct and self._background is not None:
            self._background.read_buffered(key.layer)  # it has found out, just now or before

    def _finish(self, place: Place, done: int) -> None:
        """Read what is missing after the first `done` bytes and check the record if asked to."""
        if done < len(place.target):
            place.file.read(place.key, place.offset + done, place.target[done:])
        if self._verify_on_read and place.key not in self._verified:
            self._verify(place)

    def _verify(self, place: Place) -> None:
        key, whole = place.key, place.target
        entry = self._layers[key.layer]
        offset = entry.offset(key.expert)
        if len(whole) < entry.record_bytes:  # only the whole record has a checksum
            whole = memoryview(bytearray(entry.record_bytes))
            place.file.read(key, offset, whole)
        found = record_checksum(whole)
        if found != entry.checksums[key.expert]:
            expected = entry.checksums[key.expert]
            raise ReadError(
                key, place.file.path, offset, None,
                f"checksum {found}, expected {expected}: run verify",
            )  # fmt: skip
        self._verified.add(key)


def record_checksum(record: bytes | bytearray | memoryview) -> str:
    """Checksum of one record: blake2b, 128 bits, hex."""
    return hashlib.blake2b(record, digest_size=16).hexdigest()


def check_layer_file(path: Path, entry: LayerEntry) -> None:
    """Check that a layer file's header is what the manifest says; reads no record.

    Raises:
        FormatError: the file is missing, damaged, or holds other records.
    """
    header = read_header(path)
    if len(header.tensors) != entry.num_experts:
        raise FormatError(f"{path}: {len(header.tensors)} records, need {entry.num_experts}")
    for expert in range(entry.num_experts):
        tensor = header.tensors.get(record_name(expert))
        place = (entry.offset(expert), entry.record_bytes)
        if tensor is None or tensor.dtype != "U8" or (tensor.offset, tensor.nbytes) != place:
            raise FormatError(f"{path}: record of expert {expert} is not at {place[0]}+{place[1]}")


def _choose_way(way: str | None) -> str | None:
    if way == "plain" or not native.is_available():
        return None
    return way or next(iter(native.core().read_ways()), None)
