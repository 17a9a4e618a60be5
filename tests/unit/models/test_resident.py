"""Stores whose large matrices besides the experts' are records: made, loaded, run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from fate_moe import native
from fate_moe.engine.demands import demands_of
from fate_moe.engine.prepare import convert_model
from fate_moe.errors import FormatError
from fate_moe.models import resident
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.load import load_residents, quiet_transformers, read_skeleton
from fate_moe.models.quantized import RecordEmbedding, RecordLinear, unpack_onto, use_native
from fate_moe.models.records import find_records, record_name, worth_codes
from fate_moe.models.resident import ResidentRecords
from fate_moe.models.scores import Halves
from fate_moe.quant.codec import decode, encode
from fate_moe.store.convert import convert
from fate_moe.store.format import read_manifest
from fate_moe.store.header import read_header
from tests import tiny
from tests.conftest import Open
from tests.families.tiny_config import tiny_config

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")


def make_store(checkpoint: Path, out: Path, bits: int = 4, **choices: Any) -> Path:
    """Convert with every matrix that can be codes, however small."""
    with open_checkpoint(checkpoint) as inner:
        convert(ResidentRecords(inner, bits, least_weights=1, **choices), out)
    return out


@pytest.fixture(scope="module")
def small_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tiny_checkpoint, tmp_path_factory.mktemp("resident") / "store")


def checkpoint_weight(folder: Path, name: str) -> Tensor:
    with open_checkpoint(folder) as source:
        return source._weights.load(name)


def test_large_plain_matrices_are_worth_codes(tmp_path: Path) -> None:
    config = tiny.make_config(
        num_hidden_layers=1, hidden_size=96, shared_expert_intermediate_size=40, vocab_size=2000
    )
    config.save_pretrained(tmp_path)
    skeleton = read_skeleton(tmp_path).module
    every = worth_codes(skeleton, 1)
    layer = "model.layers.0"
    assert set(every) == {
        "model.embed_tokens",
        "lm_head",
        *(f"{layer}.self_attn.{name}_proj" for name in "qkvo"),
        *(f"{layer}.mlp.shared_expert.{name}_proj" for name in ("gate", "up")),
    }  # down_proj: 40 inputs; gate: the router; shared_expert_gate: one output
    assert (every["lm_head"].rows, every["lm_head"].cols, every["lm_head"].group) == (2000, 96, 32)
    assert set(worth_codes(skeleton)) == {"model.embed_tokens", "lm_head"}


def test_routers_and_what_is_kept_wide_are_left_alone() -> None:
    def layer() -> nn.Module:
        return nn.Linear(64, 64)

    skeleton: Any = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict({"gate": layer(), "gate_proj": layer()}),
            "router": nn.ModuleDict({"layer": layer()}),
            "indexer": nn.ModuleDict({"weights_proj": layer()}),
        }
    )
    skeleton._keep_in_fp32_modules = ["indexer.weights_proj"]
    assert list(worth_codes(skeleton, 1)) == ["mlp.gate_proj"]


def test_what_is_tied_to_something_else_stays(tmp_path: Path) -> None:
    tiny.make_config(tie_word_embeddings=True).save_pretrained(tmp_path)
    skeleton: Any = read_skeleton(tmp_path).module
    assert {"lm_head", "model.embed_tokens"} < set(worth_codes(skeleton, 1))

    class ScaledEmbedding(nn.Embedding):
        """Whose forward may do more."""

    skeleton.model.embed_tokens.__class__ = ScaledEmbedding
    assert not {"lm_head", "model.embed_tokens"} & set(worth_codes(skeleton, 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_record_is_the_matrix_encoded_whole(
    bits: int, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_BLOCK_WEIGHTS", 64 * 7)  # blocks that do not divide the rows
    store = make_store(tiny_checkpoint, tmp_path / "store", bits, jobs=2)
    records = find_records(store, read_skeleton(store).module)
    assert read_manifest(store).quantization["resident_bits"] == bits
    data = (store / "resident.safetensors").read_bytes()
    for path in ("lm_head", "model.layers.3.self_attn.k_proj"):
        weight = checkpoint_weight(tiny_checkpoint, f"{path}.weight")
        entry = records.entries[path]
        want = encode(records.layouts[path], {"weight": weight})
        assert data[entry.offset : entry.offset + entry.nbytes] == want.numpy().tobytes()
    assert "lm_head.weight" not in read_header(store / "resident.safetensors").tensors


def test_layers_hold_what_the_file_holds(tiny_checkpoint: Path, small_store: Path) -> None:
    skeleton = read_skeleton(small_store)
    model, _ = load_residents(small_store, skeleton, torch.float32)
    records = find_records(small_store, skeleton.module)
    assert len(records.entries) > 20
    for path, layout in records.layouts.items():
        module = model.get_submodule(path)
        assert isinstance(module, RecordLinear | RecordEmbedding)
        want = encode(layout, {"weight": checkpoint_weight(tiny_checkpoint, f"{path}.weight")})
        assert module.record is not None
        assert torch.equal(module.record, want), path
        assert torch.equal(module.weight, decode(layout, want, torch.float32)["weight"])
    attention = model.model.layers[0].self_attn
    assert torch.equal(
        attention.q_proj.bias,
        checkpoint_weight(tiny_checkpoint, "model.layers.0.self_attn.q_proj.bias"),
    )
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_tied_matrices_share_one_record(tmp_path: Path, open_engine: Open) -> None:
    checkpoint = tiny.save_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    store = make_store(checkpoint, tmp_path / "store")
    names = read_header(store / "resident.safetensors").tensors
    assert record_name("model.embed_tokens") in names
    assert record_name("lm_head") not in names
    model = open_engine(store, experts="50%").model
    assert isinstance(model.lm_head, RecordLinear)
    assert model.lm_head.record is model.model.embed_tokens.record
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def kl_and_top1(reference: Tensor, other: Tensor) -> tuple[float, float]:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return kl, (p.argmax(-1) == q.argmax(-1)).float().mean().item()


def test_more_bits_are_closer_to_the_original(tmp_path: Path, open_engine: Open) -> None:
    """The engine's own answers, with nothing else changed: experts eager, residents eager."""
    ids = torch.arange(3, 123)[None]
    choices: dict[str, Any] = {"experts": "50%", "compute": "eager"}
    checkpoint = save_family("qwen2_moe", tmp_path / "checkpoint")
    convert_model(str(checkpoint), tmp_path / "16", cache_dir=tmp_path)
    plain = open_engine(tmp_path / "16", **choices).model(ids).logits[0]
    found = {}
    for bits in (4, 8):
        store = make_store(checkpoint, tmp_path / str(bits), bits)
        engine = open_engine(store, **choices)
        assert f"; resident INT{bits}, computed in float32; " in engine.mode
        model = engine.model
        found[bits] = kl_and_top1(plain, model(ids).logits[0])
    assert found[8][0] < 0.001
    assert found[8][1] > 0.95
    assert found[8][0] < found[4][0] / 10


def save_family(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with quiet_transformers():
        model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not native.is_available(), reason=native.why_missing)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_run_natively_from_records(
    model_type: str, tmp_path: Path, open_engine: Open
) -> None:
    store = make_store(save_family(model_type, tmp_path / "checkpoint"), tmp_path / "store")
    engine = open_engine(store, experts="50%")
    assert "; resident INT4, computed natively; " in engine.mode
    model, ids = engine.model, torch.arange(3, 43)[None]
    linears = [module for module in model.modules() if isinstance(module, RecordLinear)]
    assert len(linears) >= 4
    with torch.inference_mode():
        use_native(model, wanted=False)
        exact = model(ids).logits
        use_native(model, wanted=True)
        fast = model(ids).logits
    kl, top1 = kl_and_top1(exact[0], fast[0])
    assert 0 < kl < 0.01
    assert top1 > 0.8
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 44)


def test_a_plan_counts_records_as_they_are(tiny_store: Path, small_store: Path) -> None:
    def weights(store: Path) -> tuple[int, int]:
        skeleton = read_skeleton(store)
        need = demands_of(store, read_manifest(store), skeleton, torch.float32, 64, 1, "lru")
        return need.weights_bytes, need.load_bytes

    (plain, plain_load), (small, small_load) = weights(tiny_store), weights(small_store)
    header = read_header(small_store / "resident.safetensors")
    records = [entry for name, entry in header.tensors.items() if name.endswith(".record")]
    kept = [entry for name, entry in header.tensors.items() if not name.endswith(".record")]
    assert small == sum(entry.nbytes for entry in (*records, *kept))  # the rest is in float32
    assert small < plain / 2
    assert small_load < plain_load


def test_the_output_projection_is_told_apart_without_unpacking_it(
    small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_residents(small_store, read_skeleton(small_store), torch.float32)
    monkeypatch.setattr(RecordLinear, "weight", property(lambda self: pytest.fail("unpacked")))
    projection = Halves(model).projection
    assert projection.shape == (len(model.lm_head.record) // 4096, 4096)
    assert projection.data_ptr() == model.lm_head.record.data_ptr()


Change = Callable[[dict[str, Any]], None]


def change_manifest(store: Path, out: Path, change: Change) -> Path:
    shutil.copytree(store, out)
    manifest = json.loads((out / "fate.json").read_text())
    change(manifest["quantization"])
    (out / "fate.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (8, r"embed_tokens.record is U8 \(\d+,\), need U8 \(\d+,\)"),
        (16, "holds records, fate.json says that there are none"),
        (5, r"resident_bits is 5, must be one of \(4, 8, 16\)"),
        ("4", r"resident_bits is '4', must be"),
    ],
)
def test_a_manifest_that_lies_is_found_out(
    bits: object, message: str, small_store: Path, tmp_path: Path
) -> None:
    def change(quantization: dict[str, Any]) -> None:
        quantization["resident_bits"] = bits

    store = change_manifest(small_store, tmp_path / "store", change)
    with pytest.raises(FormatError, match=message):
        load_residents(store, read_skeleton(store), torch.float32)


def test_a_record_of_no_matrix_is_found_out(small_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    file = store / "resident.safetensors"
    data = file.read_bytes().replace(b"layers.3.self_attn.k_proj.record",
                                     b"layers.3.self_attn.x_proj.record")  # fmt: skip
    file.write_bytes(data)
    skeleton = read_skeleton(store)
    with pytest.raises(FormatError, match=r"self_attn\.x_proj\.record is no matrix of the model"):
        load_residents(store, skeleton, torch.float32)
    with pytest.raises(FormatError, match=r"self_attn\.x_proj\.record is no matrix of the model"):
        demands_of(store, read_manifest(store), skeleton, torch.float32, 64, 1, "lru")


def test_a_family_config_is_what_it_was(small_store: Path) -> None:
    skeleton = read_skeleton(small_store)
    before = skeleton.config.to_dict()
    load_residents(small_store, skeleton, torch.bfloat16)
    assert skeleton.config.to_dict() == before
    assert AutoConfig.from_pretrained(small_store).to_dict() == before


def test_unpacked_for_a_card_layers_hold_the_same_weights(small_store: Path) -> None:
    """What a GPU multiplies by: plain layers, one matrix where records are one and the same."""
    model, _ = load_residents(small_store, read_skeleton(small_store), torch.float32)
    use_native(model, False)
    ids = torch.arange(3, 19)[None]
    recorded = {
        path: (module.weight.clone(), module)
        for path, module in model.named_modules()
        if isinstance(module, RecordLinear | RecordEmbedding)
    }
    biases = [
        module.bias for _, module in recorded.values() if getattr(module, "bias", None) is not None
    ]
    assert biases
    for bias in biases:
        torch.nn.init.normal_(bias)  # zero in a fresh model, where a lost one would not show
    unpack_onto(model, torch.device("cpu"))
    assert len(recorded) > 20
    for path, (weight, before) in recorded.items():
        after = model.get_submodule(path)
        assert type(after) in (nn.Linear, nn.Embedding)
        assert torch.equal(after.weight, weight), path
        if isinstance(before, RecordLinear):
            x = torch.randn(2, before.in_features, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after(ids), before(ids))
