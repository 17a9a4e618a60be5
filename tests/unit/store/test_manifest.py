"""Does the manifest survive a round trip, and is every field of it distrusted?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.format import (
    LayerEntry,
    Manifest,
    Source,
    WholeFile,
    layer_file,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from fate_moe.types import ExpertKey


def make_manifest() -> Manifest:
    layers = tuple(
        LayerEntry(
            path=f"model.layers.{i}.mlp.experts",
            file=layer_file(i),
            num_experts=2,
            record_bytes=8192,
            head_bytes=4160,
            first_offset=4096,
            transposed=False,
            params={"gate_up_proj": (2, 32, 64), "down_proj": (2, 64, 32)},
            layout={"bits": 4, "anything": [{"name": "x"}]},
            checksums=("0" * 32, "f" * 32),
        )
        for i in range(2)
    )
    return Manifest(
        source=Source("org/model", "abc123", {"model.safetensors": "1" * 32}),
        dtype="bfloat16",
        quantization={"bits": 4, "group": 64},
        layers=layers,
        resident=WholeFile("resident.safetensors", 123456, "2" * 32),
    )


def test_round_trip() -> None:
    manifest = make_manifest()
    assert parse_manifest(write_manifest(manifest)) == manifest


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_every_width_of_a_record(bits: int) -> None:
    manifest = replace(make_manifest(), quantization={"bits": bits})
    assert parse_manifest(write_manifest(manifest)).quantization == {"bits": bits}


def test_places_and_sizes() -> None:
    manifest = make_manifest()
    layer = manifest.layers[1]
    assert layer.offset(1) == 4096 + 8192
    assert layer.file_bytes == 4096 + 2 * 8192
    assert layer.head_read_bytes == 8192
    assert manifest.expert_bytes == 4 * 8192
    assert manifest.layer(ExpertKey(1, 1)) is layer


@pytest.mark.parametrize("key", [(2, 0), (0, 2), (-1, 0), (0, -1)])
def test_no_such_expert(key: tuple[int, int]) -> None:
    with pytest.raises(StoreError, match=f"layer {key[0]}, expert {key[1]}"):
        make_manifest().layer(ExpertKey(*key))


BAD_FIELDS = [
    (("format",), 2),
    (("format",), "1"),
    (("format",), True),
    (("dtype",), "complex64"),
    (("quantization", "bits"), 2),
    (("quantization", "bits"), 12),
    (("quantization", "bits"), 64),
    (("quantization", "bits"), 16.0),
    (("quantization", "bits"), "4"),
    (("quantization",), None),
    (("layers",), []),
    (("layers",), {}),
    (("layers", 0), None),
    (("layers", 0, "path"), "model..experts"),
    (("layers", 0, "path"), "model/experts"),
    (("layers", 0, "path"), "model.layers.1.mlp.experts"),
    (("layers", 0, "file"), "../experts-00000.safetensors"),
    (("layers", 0, "file"), "/etc/passwd"),
    (("layers", 0, "file"), "a\\b.safetensors"),
    (("layers", 0, "file"), ".hidden"),
    (("layers", 0, "file"), ""),
    (("layers", 0, "file"), "a\u0000b"),
    (("layers", 0, "file"), "experts-00001.safetensors"),
    (("layers", 0, "file"), "resident.safetensors"),
    (("layers", 0, "num_experts"), 0),
    (("layers", 0, "num_experts"), "2"),
    (("layers", 0, "num_experts"), 1 << 40),
    (("layers", 0, "record_bytes"), 4097),
    (("layers", 0, "record_bytes"), 0),
    (("layers", 0, "record_bytes"), -4096),
    (("layers", 0, "record_bytes"), 1 << 62),
    (("layers", 0, "record_bytes"), 8192.0),
    (("layers", 0, "head_bytes"), 8193),
    (("layers", 0, "head_bytes"), 0),
    (("layers", 0, "first_offset"), 0),
    (("layers", 0, "first_offset"), 100),
    (("layers", 0, "transposed"), 0),
    (("layers", 0, "params", "down_proj"), [3, 64, 32]),
    (("layers", 0, "params", "down_proj"), [2, -64, 32]),
    (("layers", 0, "params", "down_proj"), "2"),
    (("layers", 0, "layout"), []),
    (("layers", 0, "checksums"), ["0" * 32]),
    (("layers", 0, "checksums", 1), "F" * 32),
    (("layers", 0, "checksums", 1), 7),
    (("layers", 0, "surprise"), 1),
    (("source", "id"), ""),
    (("source", "id"), "a\nb"),
    (("source", "revision"), 5),
    (("source", "files", "model.safetensors"), "xyz"),
    (("source", "files"), []),
    (("resident", "file"), "sub/resident.safetensors"),
    (("resident", "bytes"), -1),
    (("resident", "checksum"), None),
    (("surprise",), None),
]


@pytest.mark.parametrize(("path", "value"), BAD_FIELDS)
def test_a_bad_field_is_named(path: tuple[str | int, ...], value: object) -> None:
    data = json.loads(write_manifest(make_manifest()))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    name = next(step for step in reversed(path) if isinstance(step, str))
    with pytest.raises(FormatError) as caught:
        parse_manifest(json.dumps(data).encode(), "store/fate.json")
    message = str(caught.value)
    assert message.startswith("store/fate.json")
    assert name in message
    assert "\n" not in message
    assert len(message) < 400


def test_another_number_of_experts_contradicts_shapes_and_checksums() -> None:
    data = json.loads(write_manifest(make_manifest()))
    data["layers"][0]["num_experts"] = 3
    with pytest.raises(FormatError, match="must be a shape that starts with 3"):
        parse_manifest(json.dumps(data).encode())


def test_every_missing_field_is_named() -> None:
    data = json.loads(write_manifest(make_manifest()))
    for name in data:
        with pytest.raises(FormatError, match=name):
            parse_manifest(json.dumps({k: v for k, v in data.items() if k != name}).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format":1,"format":1}', b'{"format":NaN}'],
)
def test_what_is_no_json_object_is_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"fate\.json"):
        parse_manifest(data)


def test_deep_nesting_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        parse_manifest(b"[" * 200_000)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"fate\.json: no store here"):
        read_manifest(tmp_path)
