"""Are safetensors headers written so that anyone can read them, and read without trust?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fate_moe.errors import FormatError
from fate_moe.store.header import build_header, parse_header, read_header


def raw(fields: object, data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    a, b = header.tensors["a"], header.tensors["b"]
    assert (a.dtype, a.shape, a.nbytes) == ("I64", (2, 3), 48)
    assert data[a.offset : a.offset + a.nbytes] == tensors["a"].numpy().tobytes()
    assert (b.dtype, b.shape, b.nbytes) == ("BF16", (5,), 10)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = build_header([("experts.0", "U8", (4096,)), ("scale", "F16", (2, 2))])
    path.write_bytes(header + bytes(range(256)) * 16 + b"\x00\x3c" * 4)
    assert len(header) % 4096 == 0
    with safe_open(path, "pt") as file:
        assert file.get_tensor("experts.0").tolist() == list(range(256)) * 16
        assert file.get_tensor("scale").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert read_header(path).tensors["experts.0"].offset == len(header)


@pytest.mark.parametrize("count", [1, 30, 31, 32, 33, 60, 500])
def test_data_start_on_a_page_whatever_the_header_size(count: int) -> None:
    header = build_header([(f"experts.{e}", "U8", (4096,)) for e in range(count)])
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    parsed = parse_header(header, len(header) + 4096 * count, "x")
    assert parsed.tensors[f"experts.{count - 1}"].offset == len(header) + 4096 * (count - 1)


GOOD = {"a": tensor(0, 4), "b": tensor(4, 8, "F16", [2, 1])}
HOSTILE = {
    "hole": {"a": tensor(0, 4), "b": tensor(5, 8)},
    "overlap": {"a": tensor(0, 5), "b": tensor(4, 8)},
    "beyond the end": {"a": tensor(0, 9)},
    "rest unexplained": {"a": tensor(0, 7)},
    "backwards": {"a": tensor(4, 0, "U8", [4]), "b": tensor(4, 8)},
    "negative": {"a": tensor(-4, 4, "U8", [8])},
    "shape too large": {"a": tensor(0, 8, "F32", [3])},
    "overflow": {"a": tensor(0, 8, "U8", [1 << 61, 1 << 61])},
    "unknown dtype": {"a": tensor(0, 8, "F4", [16])},
    "dtype is a list": {"a": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}},
    "bool size": {"a": tensor(0, 8, "F64", [True])},
    "float size": {"a": tensor(0, 8, "U8", [8.0])},
    "many dims": {"a": tensor(0, 8, "U8", [8] + [1] * 9)},
    "three offsets": {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}},
    "extra field": {"a": tensor(0, 8) | {"x": 1}},
    "no dict": {"a": [0, 8]},
    "metadata no text": {"__metadata__": {"a": 1}, "a": tensor(0, 8)},
    "metadata no dict": {"__metadata__": "a", "a": tensor(0, 8)},
    "half a surrogate": {"\ud800": tensor(0, 8)},
    "half a surrogate inside": {"__metadata__": {"a": "\udfff"}, "a": tensor(0, 8)},
    "no object": ["a"],
}


def test_the_good_header_is_good() -> None:
    assert set(parse_header(raw(GOOD), len(raw(GOOD)) + 8, "x").tensors) == {"a", "b"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str) -> None:
    data = raw(HOSTILE[name])
    with pytest.raises(FormatError, match=r"^x: "):
        parse_header(data, len(data) + 8, "x")


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 1 << 63, (1 << 64) - 1])
def test_hostile_lengths_allocate_nothing(length: int) -> None:
    data = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(FormatError, match="header length"):
        parse_header(data, 1 << 40 if length > 10**8 else len(data), "x")


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((raw(GOOD) + bytes(8))[:size])
    with pytest.raises(FormatError, match="download complete"):
        read_header(path)


def test_truncated_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(GOOD) + bytes(7))
    with pytest.raises(FormatError, match=r"has \d+ bytes, its header describes"):
        read_header(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FormatError, match=str(path)):
            read_header(path)


def test_the_digest_changes_with_header_and_size() -> None:
    data = raw(GOOD)
    one = parse_header(data, len(data) + 8, "x").digest
    other = raw({"a": tensor(0, 4), "c": tensor(4, 8)})
    assert one == parse_header(data, len(data) + 8, "y").digest
    assert one != parse_header(other, len(other) + 8, "x").digest
