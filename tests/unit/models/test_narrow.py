"""Matrices of bfloat16 that stay so, where the native core computes in float32."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe import native
from fate_moe.engine.demands import demands_of
from fate_moe.engine.prepare import convert_model
from fate_moe.models import records
from fate_moe.models.load import load_residents, read_skeleton
from fate_moe.models.quantized import RecordEmbedding, RecordLinear, use_native
from fate_moe.models.scores import Halves
from fate_moe.store.format import read_manifest
from tests import tiny

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)

LARGE: dict[str, Any] = {"hidden_size": 256, "vocab_size": 601}  # no whole page


def make_store(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    checkpoint = tiny.save_checkpoint(folder / "checkpoint", **{**LARGE, "dtype": dtype, **changes})
    for file in checkpoint.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    convert_model(str(checkpoint), folder / "store", cache_dir=folder)
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("narrow"))


def load(store: Path, *, narrow: bool, dtype: torch.dtype = torch.float32) -> Any:
    model, sites = load_residents(store, read_skeleton(store), dtype, narrow=narrow)
    for site in sites:
        site.experts.attached = lambda x, ids, weights, beside=lambda: None: (
            x * weights.sum(1, True)
        )  # type: ignore[assignment]
    use_native(model, narrow)
    return model


def kept(model: Any) -> dict[str, Any]:
    kinds = RecordLinear | RecordEmbedding
    return {path: one for path, one in model.named_modules() if isinstance(one, kinds)}


@torch.no_grad()
def test_they_compute_what_wide_ones_do(store: Path) -> None:
    wide, narrow = load(store, narrow=False), load(store, narrow=True)
    assert not kept(wide)
    assert {"lm_head", "model.embed_tokens"} < kept(narrow).keys()
    for path, module in kept(narrow).items():
        assert module.record.dtype is torch.uint8
        assert module.record.numel() == 2 * wide.get_submodule(path).weight.numel()
        assert torch.equal(module.weight, wide.get_submodule(path).weight), path
    plain = dict(wide.named_parameters())
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, plain[name]), name
    ids = torch.arange(3, 20)[None]
    want, got = wide(ids).logits, narrow(ids).logits
    exact = wide.double()(ids).logits
    # torch adds up in an order of the machine's: both are rounded sums of the same products.
    assert float((got - exact).norm()) < 2 * float((want - exact).norm())


def test_what_is_tied_is_one_and_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path, tie_word_embeddings=True)
    model = load(store, narrow=True)
    assert model.lm_head.record.data_ptr() == model.model.embed_tokens.record.data_ptr()
    assert torch.equal(Halves(model).projection.float(), model.model.embed_tokens.weight)


def test_what_is_tied_though_the_file_holds_both_is_transformers_business(tmp_path: Path) -> None:
    store = make_store(tmp_path, tie_word_embeddings=True)
    file = store / "resident.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    other: Tensor = embedding.flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": other}, file, metadata={"format": "pt"})
    wide, narrow = load(store, narrow=False), load(store, narrow=True)
    assert not {"lm_head", "model.embed_tokens"} & kept(narrow).keys()
    assert torch.equal(narrow.lm_head.weight, wide.lm_head.weight)
    assert torch.equal(narrow.model.embed_tokens.weight, embedding.float())


def test_what_a_familys_code_looks_at_is_left_wide(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_source_of", lambda cls: "x @ self.q_proj.weight.T")
    paths = kept(load(store, narrow=True))
    assert "model.layers.0.self_attn.o_proj" in paths
    assert not any(path.endswith("q_proj") for path in paths)


def test_jambas_step_projection_is_looked_at() -> None:
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    assert "self.dt_proj.weight" in records._source_of(JambaMambaMixer)


def test_precisions_are_compared_through_wide_and_narrow_projections(
    store: Path, tmp_path: Path
) -> None:
    """The original runs beside experts as they are, with wide matrices; INT4 with narrow ones."""
    text = tmp_path / "text.txt"
    text.write_text("one for all and all for one " * 20)
    fate = [sys.executable, "-m", "fate_moe", "eval", str(store.parent / "checkpoint")]
    done = subprocess.run(
        [*fate, "--compare", "int4", "--text", str(text), "--tokens", "64", "--json",
         "--cache-dir", str(tmp_path), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert "int4" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_widened_as_ever(dtype: torch.dtype, tmp_path: Path) -> None:
    assert not kept(load(make_store(tmp_path, dtype), narrow=True))


def test_a_plan_counts_two_bytes_for_each_weight(store: Path) -> None:
    def weights(narrow: bool) -> tuple[int, int]:
        need = demands_of(
            store, read_manifest(store), read_skeleton(store), torch.float32, 64, 1, "lru",
            narrow=narrow,
        )  # fmt: skip
        return need.weights_bytes, need.load_bytes

    model = load(store, narrow=True)
    sizes = {one.record.data_ptr(): one.record.numel() for one in kept(model).values()}
    (wide, wide_load), (narrow, narrow_load) = weights(False), weights(True)
    assert wide - narrow == sum(sizes.values())  # four bytes less two
    assert wide_load > narrow_load
    assert narrow == sum(sizes.values()) + 4 * sum(one.numel() for one in model.parameters())
