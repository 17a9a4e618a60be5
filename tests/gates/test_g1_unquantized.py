"""G1 without quantization: part of the experts in memory gives the output of plain transformers.

Nothing stands between the checkpoint and the output here: no codes, no scales, no rounding.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe.engine.prepare import convert_model
from fate_moe.models.load import load_tokenizer, own_memory, quiet_transformers
from tests.conftest import Open

NEW_TOKENS = 16


def cast(checkpoint: Path, dtype: torch.dtype) -> None:
    """Rewrite a checkpoint in another dtype."""
    shard, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": name}))


def plain_transformers(checkpoint: Path, prompt: Tensor) -> tuple[Tensor, list[int]]:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, experts_implementation="eager"
        )
    own_memory(model, whole=True)
    with torch.no_grad():
        logits = model(prompt).logits
    out = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return logits, out[0].tolist()


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32)]
)
def test_output_equals_plain_transformers(
    dtype: torch.dtype, bits: int, tiny_checkpoint: Path, tmp_path: Path, open_engine: Open
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    cast(checkpoint, dtype)
    store, manifest = convert_model(
        str(checkpoint), tmp_path / "store", cache_dir=tmp_path, bits=16
    )
    assert manifest.quantization == {"bits": bits}
    prompt = load_tokenizer(store)("Fate streams experts.", return_tensors="pt")["input_ids"]
    want, answer = plain_transformers(checkpoint, prompt)

    engine = open_engine(store, delay=0.001, experts="25%", window=8, dtype="float32")
    with torch.no_grad():
        assert torch.equal(engine.model(prompt).logits, want)
    found = engine.model.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    assert found[0].tolist() == answer
    report = engine.report()
    assert report.misses > 0
    assert report.evictions > 0
    assert report.guesses > 0
    assert f"experts unquantized ({manifest.dtype})" in engine.mode
    engine.mover.table.check()
