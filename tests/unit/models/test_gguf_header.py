"""Is a GGUF header that is not sound refused, whatever its bytes are, and a sound one read?"""

import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe.errors import FateError, FormatError
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.gguf_header import MAX_HEADER_BYTES, read_gguf_header
from tests.unit.models.gguf_files import Type, make_model, write_gguf


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = entry(b"general.architecture", 8, text(b"llama"))
A, B = tensor(b"a", (32, 2), 0, 0), tensor(b"b", (32,), 2, 256)


def build(
    entries: tuple[bytes, ...] = (ARCH,),
    tensors: tuple[bytes, ...] = (A, B),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 288,
) -> bytes:
    """A file of two tensors, 256 and 18 bytes, unless told otherwise."""
    first = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *first) + b"".join(entries + tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(data)
    return path


def test_a_sound_header_is_read_as_gguf_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen3_moe", make_model("qwen3_moe"), lambda n: Type.Q4_0)
    header, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert set(header.tensors) == {t.name for t in theirs.tensors}
    for want in theirs.tensors:
        found = header.tensors[want.name]
        assert found.shape == tuple(want.shape.tolist()[::-1])
        assert (found.offset, found.nbytes) == (want.data_offset, want.n_bytes)
        assert found.type == want.tensor_type.name
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        if key in header.lengths:
            assert header.lengths[key] == len(field.contents())
        else:
            value = header.metadata[key]
            assert (list(value) if isinstance(value, tuple) else value) == field.contents()


def test_a_file_made_by_hand_is_sound(tmp_path: Path) -> None:
    numbers = [entry(b"n%d" % kind, kind, struct.pack(code, 1)) for kind, code in
               enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))]  # fmt: skip
    array = entry(b"list", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 1))
    wide = entry(b"general.alignment", 4, struct.pack("<I", 64))
    header = read_gguf_header(write(tmp_path, build((ARCH, *numbers, array), version=2)))
    assert header.metadata["list"] == (-1, 0, 1)
    assert [header.metadata[f"n{kind}"] for kind in range(8)] == [1] * 8
    assert [t.shape for t in header.tensors.values()] == [(2, 32), (32,)]
    header = read_gguf_header(write(tmp_path, build((ARCH, wide), data=352)))
    assert header.tensors["a"].offset % 64 == 0


UNSOUND: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic at 0 needs 4 bytes"),
    "other": (build(magic=b"GGML"), "starts with b'GGML'"),
    "version": (build(version=1), "GGUF version 1"),
    "big endian": (build(version=3 << 24), "GGUF version"),
    "many tensors": (build(counts=(1 << 60, 1)), "number of tensors is 1152921504606846976"),
    "tensors beyond the end": (build(counts=(1 << 19, 1)), "number of tensors is 524288"),
    "many keys": (build(counts=(2, 1 << 40)), "number of metadata keys is"),
    "more tensors": (build(counts=(3, 1)), "tensor name is ''|header"),
    "long key": (build((text(b"k" * 2000),)), "length of metadata key is 2000"),
    "long text": (build((entry(b"k", 8, struct.pack("<Q", 1 << 62)),)), "length of value of 'k'"),
    "no text": (build((entry(b"k", 8, text(b"\xff")),)), "value of 'k' is no UTF-8"),
    "no name": (build((entry(b"k\n", 4, bytes(4)),)), r"metadata key is 'k\\n'"),
    "twice": (build((ARCH, ARCH)), "'general.architecture' appears twice"),
    "kind": (build((entry(b"k", 13, b""),)), "value of 'k' is of type 13"),
    "nested": (build((entry(b"k", 9, struct.pack("<IQ", 9, 1)),)), "'k' is an array of type 9"),
    "long array": (build((entry(b"k", 9, struct.pack("<IQ", 10, 1 << 61)),)), "length of 'k' is"),
    "long texts": (build((entry(b"k", 9, struct.pack("<IQ", 8, 1 << 61)),)), "length of 'k' is"),
    "long word": (build((entry(b"k", 9, struct.pack("<IQQ", 8, 2, 1 << 62)),)), "does not fit"),
    "alignment": (build((entry(b"general.alignment", 4, struct.pack("<I", 48)),)), "power of two"),
    "alignment 0": (build((entry(b"general.alignment", 4, bytes(4)),)), "power of two"),
    "alignment text": (build((entry(b"general.alignment", 8, text(b"x")),)), "power of two"),
    "dims": (build(tensors=(tensor(b"a", (), 0, 0),)), "tensor 'a': 0 dimensions"),
    "five": (build(tensors=(tensor(b"a", (1,) * 5, 0, 0),)), "tensor 'a': 5 dimensions"),
    "zero": (build(tensors=(tensor(b"a", (0, 2), 0, 0),)), "tensor 'a': bad shape"),
    "blocks": (build(tensors=(tensor(b"a", (33,), 2, 0),)), "tensor 'a': bad shape"),
    "huge": (build(tensors=(tensor(b"a", (1 << 61, 1 << 61, 8), 0, 0),)), "tensor 'a' ends at"),
    "type": (build(tensors=(tensor(b"a", (32,), 99, 0),)), "tensor 'a': type 99 is unknown"),
    "old type": (build(tensors=(tensor(b"a", (32,), 4, 0),)), "tensor 'a': type 4 is unknown"),
    "odd offset": (build(tensors=(tensor(b"a", (32,), 0, 8),)), "offset 8 is no multiple of 32"),
    "beyond": (build(tensors=(tensor(b"a", (32,), 0, 1 << 60),)), "tensor 'a' ends at"),
    "overlap": (build(tensors=(A, tensor(b"b", (32,), 0, 128))), "tensor 'b' at .* overlaps"),
    "same name": (build(tensors=(A, tensor(b"a", (32,), 2, 256))), "tensor 'a' appears twice"),
    "cut": (build()[:-16], "tensor 'b' ends at .* is the download complete"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_header_names_its_culprit(case: str, tmp_path: Path) -> None:
    data, says = UNSOUND[case]
    path = write(tmp_path, data)
    with pytest.raises(FormatError, match=says) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path, "cannot be read"), (tmp_path / "none.gguf", "cannot be read")):
        with pytest.raises(FormatError, match=says):
            read_gguf_header(path)


def test_a_header_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    with path.open("wb") as file:  # sparse
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + struct.pack("<I", 8))
        file.write(struct.pack("<Q", MAX_HEADER_BYTES))
        file.truncate(MAX_HEADER_BYTES * 2)
    with pytest.raises(FormatError, match="length of value of 'k' is"):
        read_gguf_header(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    write_gguf(path, "qwen3_moe", make_model("qwen3_moe", num_hidden_layers=1), lambda n: Type.Q4_0)
    data = path.read_bytes()
    header = read_gguf_header(path)
    return path.with_name("x.gguf"), data, min(t.offset for t in header.tensors.values())


def apply(data: bytearray, start: int, change: tuple[str, int, bytes]) -> None:
    kind, at, value = change
    at %= start
    if kind == "set":
        data[at : at + len(value)] = value
    elif kind == "cut":
        del data[at:]
    else:
        data[at:at] = value


NUMBERS = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]).map(
    lambda n: struct.pack("<Q", n)
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "put", "cut"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=4) | NUMBERS,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_no_bytes_do_harm(sound: tuple[Path, bytes, int], changes: Any) -> None:
    """A changed header is refused in one line, or read with all tensors inside the file."""
    path, whole, start = sound
    data = bytearray(whole)
    for change in changes:
        apply(data, start, change)
    path.write_bytes(data)
    try:
        header = read_gguf_header(path)
    except FormatError as error:
        assert "\n" not in str(error)
        return
    ends = sorted((t.offset, t.offset + t.nbytes) for t in header.tensors.values())
    assert all(0 < begin < end <= len(data) for begin, end in ends)
    assert all(one[1] <= two[0] for one, two in pairwise(ends))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_no_bytes_harm_the_opening(sound: tuple[Path, bytes, int], changes: Any) -> None:
    """Beyond the header: metadata that say something else are refused as well, or work."""
    path, whole, start = sound
    data = bytearray(whole)
    for change in changes:
        if change[0] == "set":  # so that the header stays in step
            apply(data, start, change)
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as source:
            source.record(next(iter(_keys(source))))
    except FateError as error:
        assert re.fullmatch(r".+", str(error))


def _keys(source: Any) -> Any:
    from fate_moe.types import ExpertKey

    return [ExpertKey(0, 0)][: len(source.layers)]


def test_numbers_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    value = float(np.float32(1e-6))
    data = build((ARCH, entry(b"f", 6, struct.pack("<f", 1e-6)), entry(b"q", 10, b"\xff" * 8)))
    header = read_gguf_header(write(tmp_path, data))
    assert header.metadata["f"] == value
    assert header.metadata["q"] == 2**64 - 1
