"""May any thread read any tensor of a checkpoint at any time?"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.models.shards import Shards

COUNT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {f"t{i}": torch.full((64, 512), float(i)) for i in range(COUNT)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("has_preadv", [True, False])
def test_side_by_side_reads_do_not_meet(
    has_preadv: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    shards = Shards(folder)

    def is_whole(i: int) -> bool:
        return bool((shards.load(f"t{i % COUNT}") == i % COUNT).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_whole, range(50 * COUNT)))
    shards.close()


def test_a_file_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(folder)
    opened: list[Path] = []
    real = Path.open

    def spy(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(self)
        time.sleep(0.05)  # time for another thread to open it as well
        return real(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", spy)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(shards.load, [f"t{i}" for i in range(COUNT)]))
    assert opened == [folder / "model.safetensors"]
    shards.close()
