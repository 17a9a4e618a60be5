"""Does verify find every kind of damage, and name layer, expert and offset?"""

import json
import os
from pathlib import Path

import pytest

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.convert import convert
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource


@pytest.fixture
def folder(source: FormulaSource, tmp_path: Path) -> Path:
    convert(source, tmp_path / "store")
    return tmp_path / "store"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_an_intact_store(folder: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    report = verify(folder, lambda *step: steps.append(step))
    assert report.is_intact
    assert report.records == 6
    assert steps[-1][0] == "verify"
    assert steps[-1][1] == steps[-1][2] == report.bytes_read


@pytest.mark.parametrize("offset", [0, 1, 4095, 8191])
@pytest.mark.parametrize("expert", [0, 2])
def test_a_flipped_byte_of_a_record(folder: Path, expert: int, offset: int) -> None:
    start = 4096 + 8192 * expert
    flip(folder / "experts-00001.safetensors", start + offset)
    (finding,) = verify(folder).findings
    assert finding.key == ExpertKey(1, expert)
    assert finding.offset == start
    assert str(finding).startswith(f"layer 1, expert {expert}: experts-00001.safetensors at")
    assert verify(folder).records == 5


@pytest.mark.parametrize("offset", [4096, 4096 + 81, 20])
def test_a_flipped_byte_of_the_resident_file(folder: Path, offset: int) -> None:
    flip(folder / "resident.safetensors", offset)
    (finding,) = verify(folder).findings
    assert (finding.file, finding.key) == ("resident.safetensors", None)


def test_a_flipped_checksum(folder: Path) -> None:
    path = folder / "fate.json"
    data = json.loads(path.read_text())
    data["layers"][0]["checksums"][1] = "0" * 32
    path.write_text(json.dumps(data))
    (finding,) = verify(folder).findings
    assert finding.key == ExpertKey(0, 1)


def test_a_truncated_layer_file(folder: Path) -> None:
    os.truncate(folder / "experts-00000.safetensors", 4096 + 4096 + 10)
    findings = verify(folder).findings
    assert [finding.key for finding in findings] == [None, ExpertKey(0, 1), ExpertKey(0, 2)]
    assert "ends too early" in findings[1].why


@pytest.mark.parametrize("name", ["experts-00000.safetensors", "resident.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    findings = verify(folder).findings
    assert {finding.file for finding in findings} == {name}


@pytest.mark.parametrize("offset", [0, 30, 120, 4095])
def test_a_damaged_layer_header(folder: Path, offset: int) -> None:
    flip(folder / "experts-00000.safetensors", offset)
    findings = verify(folder).findings
    assert {(finding.file, finding.key) for finding in findings} == {
        ("experts-00000.safetensors", None)
    }


def test_bytes_after_the_resident_file(folder: Path) -> None:
    with (folder / "resident.safetensors").open("ab") as file:
        file.write(b"x")
    (finding,) = verify(folder).findings
    assert "expected" in finding.why


def test_no_store_and_no_manifest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store here"):
        verify(tmp_path)
    (folder / "fate.json").write_text("{}")
    with pytest.raises(FormatError):
        verify(folder)
