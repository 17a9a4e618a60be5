"""The check of a GPU says when there is none, and its layers are what the kernels compute."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton")

from scripts import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "found.json")]) == 2
    assert "no CUDA card" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("low", [False, True])
def test_a_made_up_layer_is_computed_exactly(low: bool) -> None:
    shape = gpu_check.Shape("tiny", 64, 64, 4, 2)
    layer = gpu_check.Layer(shape, "cuda" if torch.cuda.is_available() else "cpu")
    assert 0 < layer.error(3, torch.float32, low) < 2e-6
    layer.slots[:, : shape.layout.offsets[0].high] = 0  # no scales, no experts
    x, ids, weights = layer.step(2, torch.float32)
    assert layer.gpu(x, ids, weights, layer.arriving(ids, low)).norm() == 0
