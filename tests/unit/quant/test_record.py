"""Does a record layout place its sections as documented, and refuse a hostile description?"""

import json

import pytest

from fate_moe.errors import FormatError, ModelError
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout, choose_group

LAYOUT = RecordLayout(
    (MatrixSpec("gate_up_proj", 64, 576, 64), MatrixSpec("down_proj", 576, 32, 32)),
    (BiasSpec("gate_up_proj_bias", 64),),
)


def sections(layout: RecordLayout) -> list[tuple[int, int]]:
    """Every section as (start, size), in documented order."""
    pairs = list(zip(layout.matrices, layout.offsets, strict=True))
    found = [
        place for m, at in pairs for place in ((at.scale, m.meta_bytes), (at.zero, m.meta_bytes))
    ]
    found += [
        (start, 4 * b.size) for b, start in zip(layout.biases, layout.bias_offsets, strict=True)
    ]
    found += [(at.high, m.plane_bytes) for m, at in pairs]
    return found + [(at.low, m.plane_bytes) for m, at in pairs]


ODD = RecordLayout((MatrixSpec("a", 3, 96, 32), MatrixSpec("b", 5, 32, 32)), (BiasSpec("c", 3),))
INT8 = RecordLayout(ODD.matrices, ODD.biases, 8)
PLAIN = (MatrixSpec("a", 3, 50, 0), MatrixSpec("b", 5, 7, 0))  # no group divides 50 or 7
BF16 = RecordLayout(PLAIN, ODD.biases, 16, "bfloat16")
FP16 = RecordLayout(PLAIN, ODD.biases, 16, "float16")
FP32 = RecordLayout(PLAIN, (), 32, "float32")
WITHOUT_PLANES = {"8 bits": INT8, "bf16": BF16, "fp16": FP16, "fp32": FP32}


@pytest.mark.parametrize("layout", [LAYOUT, ODD], ids=["even", "odd"])
def test_sections_follow_each_other_aligned_and_disjoint(layout: RecordLayout) -> None:
    end = 0
    for start, size in sections(layout):
        assert start % 64 == 0
        assert end <= start < end + 64
        end = start + size
    assert 0 <= layout.record_bytes - end < 4096 + 64
    assert layout.record_bytes % 4096 == 0


def test_the_head_ends_where_the_low_plane_starts() -> None:
    assert LAYOUT.head_bytes == LAYOUT.offsets[0].low
    assert LAYOUT.head_bytes % 64 == 0


def test_sizes_of_a_known_layout() -> None:
    plain = RecordLayout(LAYOUT.matrices)
    # 2 * (64*9 + 576) fp16 scales and zeros, two planes of a quarter byte per weight
    assert plain.head_bytes == 4 * (64 * 9 + 576) + (64 * 576 + 576 * 32) // 4
    assert plain.record_bytes == 32768
    assert plain.bits == 4


@pytest.mark.parametrize("layout", WITHOUT_PLANES.values(), ids=WITHOUT_PLANES)
def test_without_planes_the_values_follow_the_metadata(layout: RecordLayout) -> None:
    places = []
    for m, at in zip(layout.matrices, layout.offsets, strict=True):
        places += [(at.scale, m.meta_bytes), (at.zero, m.meta_bytes)]
        assert at.values == at.high == at.low
    biases = zip(layout.biases, layout.bias_offsets, strict=True)
    places += [(start, 4 * bias.size) for bias, start in biases]
    for m, at in zip(layout.matrices, layout.offsets, strict=True):
        places.append((at.values, m.rows * m.cols * layout.bits // 8))
    end = 0
    for start, size in places:
        assert start % 64 == 0
        assert end <= start < end + 64
        end = start + size
    assert end <= layout.head_bytes < end + 64
    assert layout.head_bytes % 64 == 0
    assert layout.record_bytes == 4096


def test_sizes_without_planes() -> None:
    matrices = (MatrixSpec("w", 64, 576, 64),)
    assert RecordLayout(matrices, (), 8).head_bytes == 64 * 576 + 4 * 64 * 9
    matrices = (MatrixSpec("w", 64, 576, 0),)
    assert RecordLayout(matrices, (), 16, "float16").record_bytes == 2 * 64 * 576
    assert RecordLayout(matrices, (), 32, "float32").record_bytes == 4 * 64 * 576


ALL = {"4 bits": LAYOUT, **WITHOUT_PLANES}


@pytest.mark.parametrize("layout", ALL.values(), ids=ALL)
def test_json_round_trip(layout: RecordLayout) -> None:
    assert RecordLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_the_json_of_four_bits_never_changes() -> None:
    assert json.dumps(LAYOUT.to_json()) == (
        '{"bits": 4, "matrices": [{"name": "gate_up_proj", "rows": 64, "cols": 576, "group": 64}, '
        '{"name": "down_proj", "rows": 576, "cols": 32, "group": 32}], '
        '"biases": [{"name": "gate_up_proj_bias", "size": 64}]}'
    )


def test_only_unquantized_layouts_name_a_dtype() -> None:
    assert "dtype" not in INT8.to_json()
    assert BF16.to_json()["dtype"] == "bfloat16"
    assert FP32.to_json()["dtype"] == "float32"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bits",), 2),
        (("bits",), True),
        (("matrices",), []),
        (("matrices",), "gate"),
        (("matrices",), [{"name": "a", "rows": 1, "cols": 64, "group": 64}] * 2),
        (("matrices",), [{"name": "a", "rows": 1, "cols": 64, "group": 64}] * 17),
        (("matrices", 0, "rows"), 0),
        (("matrices", 0, "rows"), -64),
        (("matrices", 0, "rows"), 64.0),
        (("matrices", 0, "rows"), 1 << 60),
        (("matrices", 0, "cols"), 577),
        (("matrices", 0, "group"), 16),
        (("matrices", 0, "group"), 0),
        (("dtype",), "bfloat16"),
        (("matrices", 0, "name"), "../weight"),
        (("matrices", 0, "name"), None),
        (("matrices", 0, "extra"), 1),
        (("biases", 0, "size"), False),
        (("biases", 0, "name"), "down_proj"),
        (("biases",), None),
        (("extra",), 1),
    ],
)
def test_a_bad_field_is_a_format_error(path: tuple[str | int, ...], value: object) -> None:
    data = LAYOUT.to_json()
    place: object = data
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    with pytest.raises(FormatError, match=r"layout|matrix"):
        RecordLayout.from_json(data)


@pytest.mark.parametrize(
    ("layout", "field", "value"),
    [
        (INT8, "dtype", "bfloat16"),
        (INT8, "dtype", ""),
        (INT8, "bits", 8.0),
        (INT8, "bits", 16),
        (INT8, "bits", 7),
        (INT8, "bits", [8]),
        (BF16, "dtype", None),
        (BF16, "dtype", ""),
        (BF16, "dtype", "float32"),
        (BF16, "dtype", "int16"),
        (BF16, "dtype", ["bfloat16"]),
        (BF16, "bits", 16.0),
        (BF16, "bits", 32),
        (BF16, "bits", 8),
        (BF16, "bits", 64),
        (FP32, "dtype", "bfloat16"),
        (FP32, "bits", 16),
        (FP32, "matrices", [{"name": "a", "rows": 1, "cols": 64, "group": 64}]),
        (FP32, "matrices", [{"name": "a", "rows": 1, "cols": 64, "group": False}]),
        (FP32, "matrices", [{"name": "a", "rows": 1 << 20, "cols": 1 << 20, "group": 0}]),
        (INT8, "matrices", [{"name": "a", "rows": 1, "cols": 64, "group": 0}]),
    ],
)
def test_bits_dtype_and_groups_must_agree(layout: RecordLayout, field: str, value: object) -> None:
    with pytest.raises(FormatError, match=r"layout|matrix") as caught:
        RecordLayout.from_json({**layout.to_json(), field: value})  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)


def test_unquantized_layouts_need_their_dtype() -> None:
    data = BF16.to_json()
    del data["dtype"]
    with pytest.raises(FormatError, match="dtype"):
        RecordLayout.from_json(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["bits", "matrices", "biases"])
def test_a_missing_field_is_a_format_error(field: str) -> None:
    data = LAYOUT.to_json()
    del data[field]
    with pytest.raises(FormatError, match=field):
        RecordLayout.from_json(data)


def test_groups() -> None:
    assert choose_group("w", 128) == 64
    assert choose_group("w", 96) == 32
    assert choose_group("w", 128, preferred=32) == 32
    with pytest.raises(ModelError, match=r"layers\.3\.down_proj: 48 inputs"):
        choose_group("layers.3.down_proj", 48)
