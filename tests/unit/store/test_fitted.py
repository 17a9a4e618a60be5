"""Fitted maps come back as written, and nobody else's are taken."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.fitted import Map, Maps, read_fitted, write_fitted
from fate_moe.store.format import MANIFEST_FILE, Manifest, read_manifest
from fate_moe.store.verify import verify
from tests import tiny

HIDDEN = tiny.SIZES["hidden_size"]


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def some_maps(seed: int = 0, hidden: int = HIDDEN) -> Maps:
    draw = np.random.default_rng(seed)

    def one() -> Map:
        weight = draw.standard_normal((tiny.EXPERTS, hidden)).astype(np.float16)
        bias = draw.standard_normal(tiny.EXPERTS).astype(np.float32)
        return Map(weight.astype(np.float32), bias)

    early = [None, *(one() for _ in range(tiny.LAYERS - 1))]
    return {"early": early, "late": [one(), *[None] * (tiny.LAYERS - 1)]}


def manifest_of(store: Path) -> Manifest:
    return read_manifest(store)


def test_there_and_back(store: Path) -> None:
    assert read_fitted(store, manifest_of(store), HIDDEN)["early"] == [None] * tiny.LAYERS
    maps = some_maps()
    written = write_fitted(store, manifest_of(store), maps)
    assert manifest_of(store) == written
    back = read_fitted(store, written, HIDDEN)
    for stage in ("early", "late"):
        for have, want in zip(back[stage], maps[stage], strict=True):
            if have is None or want is None:
                assert have is want
                continue
            np.testing.assert_array_equal(have.weight, want.weight)
            np.testing.assert_array_equal(have.bias, want.bias)
    assert verify(store).is_intact


def test_written_again_the_old_file_goes(store: Path) -> None:
    first = write_fitted(store, manifest_of(store), some_maps(0))
    second = write_fitted(store, first, some_maps(1))
    assert first.fitted is not None
    assert second.fitted is not None
    files = [path.name for path in store.glob("fitted-*")]
    assert files == [second.fitted.file] != [first.fitted.file]


def test_a_changed_byte_is_found(store: Path) -> None:
    manifest = write_fitted(store, manifest_of(store), some_maps())
    assert manifest.fitted is not None
    path = store / manifest.fitted.file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not as it was written; run fate calibrate again"):
        read_fitted(store, manifest, HIDDEN)
    assert [finding.file for finding in verify(store).findings] == [manifest.fitted.file]


def test_a_missing_file_is_one_line(store: Path) -> None:
    manifest = write_fitted(store, manifest_of(store), some_maps())
    assert manifest.fitted is not None
    (store / manifest.fitted.file).unlink()
    with pytest.raises(FormatError, match=manifest.fitted.file):
        read_fitted(store, manifest, HIDDEN)


def test_maps_of_another_model_are_refused(store: Path) -> None:
    manifest = write_fitted(store, manifest_of(store), some_maps(hidden=HIDDEN + 1))
    with pytest.raises(FormatError, match="the early map of layer 1 is of another model"):
        read_fitted(store, manifest, HIDDEN)
    whole = write_fitted(store, manifest, some_maps())
    fewer = replace(whole, layers=whole.layers[:-1])
    with pytest.raises(FormatError, match=r"'early\.5\.\w+' belongs to no layer"):
        read_fitted(store, fewer, HIDDEN)


def test_a_manifest_that_names_one_file_twice_is_refused(store: Path) -> None:
    write_fitted(store, manifest_of(store), some_maps())
    data = json.loads((store / MANIFEST_FILE).read_text())
    data["fitted"]["file"] = data["resident"]["file"]
    (store / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(FormatError, match="appears twice"):
        manifest_of(store)


def test_a_store_that_cannot_be_written_stays_as_it_was(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (store / MANIFEST_FILE).read_bytes()

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match="cannot be written: Permission denied"):
        write_fitted(store, manifest_of(store), some_maps())
    assert (store / MANIFEST_FILE).read_bytes() == before
