"""G3 where the matrices besides the experts' are records: the peak stays within a smaller plan."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_moe.engine.prepare import convert_model
from tests import tiny

RUN = """
import json, sys
from pathlib import Path
import torch
from fate_moe.config import make_config
from fate_moe.engine import build
from fate_moe.errors import BudgetError
store, compute = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
def make(ram):
    return make_config(ram=ram, context_tokens=256, compute=compute)
try:
    build(store, make("1MiB"))
except BudgetError as error:
    floor = error.floor_bytes
engine = build(store, make(floor + 8 * 2**20))
ids = torch.arange(3, 203)[None]
with torch.inference_mode():
    engine.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    engine.model(ids[:, :1])
report, demands = engine.report(), engine.blueprint.memory.demands
print(json.dumps({
    "peak": report.peak_rss_bytes, "planned": report.planned_bytes, "budget": report.budget_bytes,
    "weights": demands.weights_bytes, "load": demands.load_bytes, "mode": engine.mode,
    "base": demands.base_bytes,
}))
"""


def run(store: Path, compute: str) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(store), compute]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def vocabulary_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two matrices of 16 M weights each: 64 MiB in float32, 9 MiB as a record of four bits."""
    folder = tmp_path_factory.mktemp("records")
    checkpoint = tiny.save_checkpoint(
        folder / "checkpoint", vocab_size=1 << 16, hidden_size=256, num_hidden_layers=2
    )
    store, _ = convert_model(
        str(checkpoint), folder / "store", cache_dir=folder, resident=4, fitted=False
    )
    return store


@pytest.mark.parametrize("compute", ["auto", "eager"])
def test_the_peak_stays_within_the_plan(vocabulary_store: Path, compute: str) -> None:
    seen = run(vocabulary_store, compute)
    assert "resident INT4" in seen["mode"]
    assert seen["weights"] < 32 * 2**20  # never as floats: one matrix alone is twice as large
    assert seen["peak"] <= seen["planned"] <= seen["budget"]
