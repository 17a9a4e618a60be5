"""Whatever the bytes of a header or a manifest are: is the answer a valid object or FormatError?"""

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from fate_moe.errors import FormatError
from fate_moe.quant.record import RecordLayout
from fate_moe.store.format import parse_manifest, write_manifest
from fate_moe.store.header import ITEM_BYTES, build_header, parse_header, tensor_bytes
from tests.unit.store.test_manifest import make_manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
SIZES = st.lists(st.integers(-2, 12) | st.integers(), max_size=4)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", ""]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | SIZES | JSON,
    }
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), TENSOR | JSON)


def raw(fields: object, length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    size = len(text) if length is None else length
    return (size % 2**64).to_bytes(8, "little") + text


def check_header(data: bytes, file_bytes: int) -> None:
    """Parse; a header that is accepted must describe the file exactly."""
    try:
        header = parse_header(data, file_bytes, "x")
    except FormatError:
        return
    end = 8 + int.from_bytes(data[:8], "little")
    for entry in header.tensors.values():
        assert entry.offset == end
        assert entry.nbytes == tensor_bytes(entry.dtype, entry.shape)
        end += entry.nbytes
    assert end == file_bytes


@given(st.binary(max_size=200), st.integers(0, 400))
def test_random_bytes(data: bytes, file_bytes: int) -> None:
    check_header(data, file_bytes)


@settings(max_examples=300)
@given(HEADER | JSON, st.integers(0, 40), st.none() | st.integers(0, 2**64 - 1))
def test_hostile_headers(fields: object, rest: int, length: int | None) -> None:
    data = raw(fields, length)
    check_header(data, len(data) + rest)


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["U8", "F16", "F64", "BOOL"]), st.lists(st.integers(0, 5), max_size=3)
        ),
        max_size=5,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
)
def test_what_we_accept_the_library_accepts_too(
    tensors: dict[str, tuple[str, list[int]]], flips: list[tuple[int, int]]
) -> None:
    described = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in described)
    data = bytearray(build_header(described) + bytes(size))
    for place, value in flips:
        data[place] = value
    try:
        header = parse_header(bytes(data), len(data), "x")
    except FormatError:
        assert flips
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            with safe_open(path, "np") as file:
                assert set(file.keys()) == set(header.tensors)
        except SafetensorError as error:
            raise AssertionError("accepted by us, refused by safetensors") from error


def test_item_sizes_are_those_of_the_library() -> None:
    for dtype, size in ITEM_BYTES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            path.write_bytes(build_header([("a", dtype, (3,))]) + bytes(3 * size))
            with safe_open(path, "pt") as file:
                assert file.get_slice("a").get_dtype() == dtype


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


MANIFEST = json.loads(write_manifest(make_manifest()))


@settings(max_examples=300)
@given(st.sampled_from(places(MANIFEST)), JSON | st.integers(-1, 1 << 70), st.booleans())
def test_one_changed_place_of_a_manifest(
    path: tuple[object, ...], value: object, remove: bool
) -> None:
    data = json.loads(json.dumps(MANIFEST))
    place = data
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    text = json.dumps(data).encode()
    try:
        manifest = parse_manifest(text)
    except FormatError:
        return
    for layer in manifest.layers:  # an accepted one is consistent and stays in its folder
        assert len(layer.checksums) == layer.num_experts
        assert layer.record_bytes % 4096 == layer.first_offset % 4096 == 0
        assert 0 < layer.head_bytes <= layer.record_bytes
        assert "/" not in layer.file
        assert not layer.file.startswith(".")
    assert parse_manifest(write_manifest(manifest)) == manifest


@settings(max_examples=200)
@given(JSON)
def test_hostile_layouts(data: object) -> None:
    good = {"name": "w", "rows": 2, "cols": 64, "group": 64}
    for layout in (data, {"bits": 4, "matrices": data, "biases": []},
                   {"bits": 4, "matrices": [data], "biases": []},
                   {"bits": 4, "matrices": [good | {"rows": data}], "biases": []},
                   {"bits": 4, "matrices": [good], "biases": data}):  # fmt: skip
        try:
            parsed = RecordLayout.from_json(layout)  # type: ignore[arg-type]
        except FormatError:
            continue
        assert parsed.record_bytes % 4096 == 0
        assert parsed.head_bytes < parsed.record_bytes
