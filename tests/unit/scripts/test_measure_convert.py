"""Does the measurement of converting measure a real conversion, and clean up after itself?"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.types import ExpertKey

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise, O_DIRECT, /proc")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    import measure_convert

    monkeypatch.setattr(measure_convert, "SHARD_BYTES", 1 << 20)
    monkeypatch.setattr(measure_convert, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(measure_convert, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(measure_convert, "SAMPLE_S", 2.0)
    return measure_convert


def tiny(script: Any) -> Any:
    return script.Shape(
        layers=2, experts=5, hidden=128, expert_width=192, shared_width=256, vocabulary=1024,
        heads=4,
    )  # fmt: skip


def test_the_checkpoint_is_a_sharded_qwen2_moe(script: Any, tmp_path: Path) -> None:
    folder, shape = tmp_path / "checkpoint", tiny(script)
    size = script.make_checkpoint(shape, folder)
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) >= 2
    assert 0 <= sum(path.stat().st_size for path in shards) - size < len(shards) << 13
    with open_checkpoint(folder) as source:
        assert [layer.num_experts for layer in source.layers] == [5, 5]
        first, second = (source.expert(ExpertKey(1, e))["down_proj"].float() for e in (0, 1))
        assert first.shape == (128, 192)
        assert 0.015 < first.std() < 0.025
        assert not first.equal(second)


def test_the_whole_model_has_the_published_size(script: Any) -> None:
    shape = script.Shape()
    count = sum(
        dims[0] * (dims[1] if len(dims) > 1 else 1) for _, dims in shape.tensors()
    )  # the published model has 14.3 B weights
    assert 14.2e9 < count < 14.4e9
    assert shape.config()["num_experts_per_tok"] == 4


def test_a_tiny_run_fills_the_table(script: Any, tmp_path: Path) -> None:
    text = script.measure(tmp_path, tiny(script), 2, 0)
    for row in (
        "disk read, O_DIRECT",
        "quantizing, 2 threads",
        "share of the slower",
        "peak memory",
    ):
        assert f"| {row}" in text
    store = json.loads((tmp_path / "store" / "fate.json").read_text())
    assert len(store["layers"]) == 2
    assert "cgroup" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: int, script: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def interrupted() -> None:
        with script.workplace(tmp_path, keep=False) as folder:
            script.make_checkpoint(tiny(script), folder / "checkpoint")
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
