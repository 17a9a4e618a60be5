"""`fate calibrate`, as a person or a program calls it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fate_moe.cli import app
from fate_moe.cli import stores as _stores  # noqa: F401 - registers the command
from fate_moe.cli.calibrate import spread
from fate_moe.config import format_bytes
from fate_moe.engine.calibrate import LayerFit
from tests import tiny
from tests.unit.cli.test_commands import refused


def fate(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    chance = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(chance.choices("abcdefgh ", k=9000)), encoding="utf-8")
    return path


def test_a_calibrated_store_guesses_from_its_maps(
    tiny_store: Path, tmp_path: Path, text: Path
) -> None:
    store = shutil.copytree(tiny_store, tmp_path / "store")
    result = fate("calibrate", store, "--text", text, "--judge", text, "--tokens", "4096", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["layer"] for row in data["layers"]] == list(range(tiny.LAYERS))
    assert any(row["late"] for row in data["layers"])
    assert fate("verify", store).exit_code == 0
    _inspect_names_its_maps(store)

    def report(path: Path) -> dict[str, object]:
        asked = ("generate", path, "-p", "abc", "-n", "12", "--experts", "60%", "--json")
        found: dict[str, object] = json.loads(fate(*asked).stdout)
        return found

    before, after = report(tiny_store), report(store)
    assert before["token_ids"] == after["token_ids"]
    assert after["guesses_used"]
    assert "predictor cross_layer (fate calibrate would fit a better one)" in str(before["mode"])
    assert "predictor ridge, cache transition" in str(after["mode"])


def _inspect_names_its_maps(store: Path) -> None:
    (file,) = store.glob("fitted-*")
    size = file.stat().st_size
    assert json.loads(fate("inspect", store, "--json").stdout)["maps"] == {
        "file": file.name,
        "bytes": size,
    }
    shown = f"maps: {format_bytes(size)}, fitted for --predictor ridge\n"
    assert shown in fate("inspect", store).stdout


def test_inspect_says_where_there_are_no_maps(tiny_store: Path) -> None:
    assert json.loads(fate("inspect", tiny_store, "--json").stdout)["maps"] is None
    shown = "maps: none; fate calibrate fits them for --predictor ridge\n"
    assert shown in fate("inspect", tiny_store).stdout


def test_a_table_for_people(tiny_store: Path, tmp_path: Path, text: Path) -> None:
    store = shutil.copytree(tiny_store, tmp_path / "store")
    result = fate("calibrate", store, "--text", text, "--tokens", "2048")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split("\t") == ["layer", "guesses", "paper", "early", "late"]
    assert len(lines) == 1 + tiny.LAYERS
    assert "recall, paper: " in result.stderr
    assert f"written: {store}" in result.stderr


@pytest.mark.parametrize("length", [100, 2048, 2049, 5000, 100_000])
def test_a_long_text_is_taken_from_all_over(length: int) -> None:
    ids = spread(torch.arange(length), 2048)
    assert len(ids) == min(length, 2048)
    assert len(ids.unique()) == len(ids)
    assert bool((ids.diff() > 0).all())
    assert int(ids[-1]) >= length * 3 // 4 - 512


def test_bad_input_is_one_line(tiny_store: Path, tmp_path: Path) -> None:
    refused(fate("calibrate", tiny_store), "text: none given; try fate calibrate --text FILE")
    refused(fate("calibrate", tiny_store, "--text", tmp_path / "absent"), "absent: cannot be read")
    short = tmp_path / "short.txt"
    short.write_text("hello", encoding="utf-8")
    refused(fate("calibrate", tiny_store, "--text", short), "calibrating takes 2048 or more")


def test_maps_that_help_nobody_take_no_ones_place(
    tiny_store: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(tiny_store, tmp_path / "store")
    first = fate("calibrate", store, "--text", text, "--judge", text, "--tokens", "4096")
    assert first.exit_code == 0, first.output
    assert "in place of" not in first.stderr
    again = fate("calibrate", store, "--text", text, "--judge", text, "--tokens", "4096")
    assert "in place of the maps it had" in again.stderr
    before = {path.name: path.read_bytes() for path in store.glob("fitted-*")}
    row = LayerFit(0, 4, 0.9, None, None)
    monkeypatch.setattr("fate_moe.engine.calibrate._Fits.row", lambda self, layer: row)
    refused(fate("calibrate", store, "--text", text, "--tokens", "2048"), "no map tells a router")
    assert before == {path.name: path.read_bytes() for path in store.glob("fitted-*")}
