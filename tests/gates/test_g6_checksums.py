"""G6: a flipped byte in a record is found, by `verify` and by the first load that checks."""

import shutil
from pathlib import Path

import pytest
import torch

from fate_moe.errors import ReadError
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.conftest import Open


@pytest.fixture
def damaged(tiny_store: Path, tmp_path: Path) -> tuple[Path, ExpertKey]:
    return damage(tiny_store, tmp_path / "store")


def damage(sound: Path, store: Path) -> tuple[Path, ExpertKey]:
    """Copy a store and flip one bit of one record."""
    shutil.copytree(sound, store)
    key = ExpertKey(4, 9)
    entry = read_manifest(store).layers[key.layer]
    with (store / entry.file).open("r+b") as file:
        file.seek(entry.offset(key.expert) + 777)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    return store, key


def test_verify_names_the_expert(damaged: tuple[Path, ExpertKey], tiny_store: Path) -> None:
    store, key = damaged
    findings = verify(store).findings
    assert [finding.key for finding in findings] == [key]
    assert verify(tiny_store).is_intact


@pytest.mark.smolmoe
def test_verify_names_the_expert_of_smolmoe_too(
    smolmoe_store: Path, tmp_path: Path, open_engine: Open
) -> None:
    store, key = damage(smolmoe_store, tmp_path / "store")
    assert [finding.key for finding in verify(store).findings] == [key]
    with pytest.raises(ReadError, match="layer 4, expert 9.*checksum"):
        open_engine(store, policy="resident", verify=True)


def test_a_checked_load_refuses_the_expert(
    damaged: tuple[Path, ExpertKey], open_engine: Open
) -> None:
    store, _ = damaged
    with pytest.raises(ReadError, match="layer 4, expert 9.*checksum"):
        open_engine(store, policy="resident", verify=True)
    unchecked = open_engine(store, policy="resident")
    with torch.no_grad():
        unchecked.model(torch.arange(3, 20)[None])


def test_a_checked_generation_refuses_the_expert(
    damaged: tuple[Path, ExpertKey], open_engine: Open
) -> None:
    engine = open_engine(damaged[0], policy="demand", experts="25%", verify=True)
    with pytest.raises(ReadError, match="checksum"), torch.no_grad():
        engine.model(torch.arange(3, 250)[None])
