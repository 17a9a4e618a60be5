"""Settings are read once, strictly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.config import Size, format_bytes, make_config, parse_size
from fate_moe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * 2**20),
        ("6GiB", 6 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("6g", 6 * 2**30),
        ("4096", 4096),
        (4096, 4096),
        ("10b", 10),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == Size(count_bytes=expected)


def test_shares_are_of_something() -> None:
    assert parse_size("50%").of(1000) == 500
    assert parse_size("12.5%").of(1000) == 125
    assert parse_size("1KiB").of(10) == 1024


@pytest.mark.parametrize("text", ["", "lots", "6GX", "-1GiB", "%", "101%", "1e9", "GiB", "5 0%"])
def test_bad_sizes_say_what_would_do(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ram: .*(write 512MiB, 6GiB or 50%|over 100%)"):
        parse_size(text, "ram")


@given(st.integers(0, 2**50))
def test_sizes_are_written_so_that_they_can_be_read(count: int) -> None:
    again = parse_size(format_bytes(count)).count_bytes
    assert again is not None
    assert abs(again - count) <= 0.06 * max(count, 1)


def test_presets_and_choices() -> None:
    assert make_config("fate").predict.predictor == "cross_layer"
    assert make_config("demand").predict.predictor == "none"
    assert make_config("demand", predictor="cross_layer").predict.predictor == "cross_layer"
    resident = make_config("resident")
    assert resident.limits.experts == Size(share=1.0)
    assert make_config(ram="1GiB", cache=None).limits.ram == Size(count_bytes=2**30)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"policy": "fast"}, "'fast' is none of demand, fate, path, resident"),
        ({"policy": "resident", "experts": "50%"}, "leave --experts out"),
        ({"cash": "lru"}, "unknown setting: cash"),
        ({"dtype": "int8"}, "'int8' is none of"),
        ({"io_threads": 0}, "io_threads: have 0"),
        ({"window": -1}, "window: have -1"),
        ({"percentile": 101.0}, "percentile: have 101"),
        ({"threads": 0}, "threads: have 0"),
        ({"context_tokens": 0}, "context: have 0"),
        ({"shallow_layers": -1}, "shallow_layers: have -1"),
    ],
)
def test_bad_choices_are_named(choices: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**choices)  # type: ignore[arg-type]
