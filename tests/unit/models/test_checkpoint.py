"""Are the experts of every family found, read in the right order, and incomplete models refused?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fate_moe.errors import FateError, FormatError, ModelError
from fate_moe.models.checkpoint import CheckpointSource, open_checkpoint
from fate_moe.models.load import quiet_transformers
from fate_moe.quant.balance import balance
from fate_moe.quant.codec import decode
from fate_moe.quant.record import RecordLayout
from fate_moe.store.convert import convert
from fate_moe.store.reader import FileReader
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey

BASE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "qwen2_moe": {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4,
                  "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_moe": {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4,
                  "head_dim": 16},
    "olmoe": {"intermediate_size": 32, "num_experts": 4},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 4},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 16},
    "deepseek_v3": {"intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4,
                    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                    "v_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
}  # fmt: skip
FUSED = {"granitemoe", "gpt_oss"}


def save(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **change: object) -> None:
    """Save a tiny random model of a family."""
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {}), **change})
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.05)
        model.save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def edit_config(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def expert_keys(folder: Path) -> list[str]:
    return [key for key in load_file(folder / "model.safetensors") if "experts." in key]


def original(model: nn.Module, path: str, name: str, expert: int, transposed: bool) -> Tensor:
    weight: Tensor = getattr(model.get_submodule(path), name)[expert].detach()
    return weight.mT if transposed and weight.dim() == 2 else weight


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture
def qwen(folder: Path) -> Path:
    save("qwen2_moe", folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_the_models_own_bit_for_bit(family: str, folder: Path) -> None:
    save(family, folder)
    model = load(folder)
    with open_checkpoint(folder) as source:
        paths = [path for path, module in model.named_modules() if hasattr(module, "is_transposed")]
        assert [layer.path for layer in source.layers] == paths
        for index, layer in enumerate(source.layers):
            assert layer.num_experts == 4
            for expert in range(4):
                found = source.expert(ExpertKey(index, expert))
                assert set(found) == set(layer.params)
                for name, tensor in found.items():
                    want = original(model, layer.path, name, expert, layer.transposed)
                    assert tensor.dtype == torch.bfloat16
                    assert torch.equal(tensor, want), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_holds_the_experts_and_the_rest(family: str, folder: Path, tmp_path: Path) -> None:
    save(family, folder)
    model = load(folder)
    with open_checkpoint(folder) as source:
        manifest = convert(source, tmp_path / "store")
    assert verify(tmp_path / "store").is_intact
    assert manifest.dtype == "bfloat16"
    assert manifest.layers[0].transposed == (family == "gpt_oss")
    # gpt_oss has biases and a gate of its own: it is not linear in up.
    assert ("balanced" in manifest.quantization) == (family != "gpt_oss")
    reader = FileReader(tmp_path / "store", manifest)
    for index, layer in enumerate(manifest.layers):
        layout = RecordLayout.from_json(dict(layer.layout))
        record = torch.empty(layer.record_bytes, dtype=torch.uint8)
        for expert in range(layer.num_experts):
            reader.read_into(ExpertKey(index, expert), record.numpy().data)
            whole = {
                name: original(model, layer.path, name, expert, layer.transposed).float()
                for name in layer.params
            }
            if manifest.quantization.get("balanced"):
                names = ("gate_up_proj", "down_proj")
                whole = dict(zip(names, balance(*(whole[n] for n in names)), strict=True))
            for name, tensor in decode(layout, record, torch.float32).items():
                want = whole[name]
                limit = 1e-3 if want.dim() == 1 else 0.1
                assert ((tensor - want).norm() / want.norm()).item() < limit
    reader.close()
    checkpoint = load_file(folder / "model.safetensors")
    resident = load_file(tmp_path / "store" / "resident.safetensors")
    gone = set(checkpoint) - set(resident)
    assert resident
    assert all(torch.equal(resident[key], checkpoint[key]) for key in resident)
    assert gone == {key for key in checkpoint if ".experts." in key or "put_linear" in key}


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_records_hold_the_experts_bit_for_bit(family: str, folder: Path) -> None:
    save(family, folder)
    model = load(folder)
    with open_checkpoint(folder, bits=16) as source:
        assert source.quantization == {"bits": 16}
        for index, layer in enumerate(source.layers):
            layout = RecordLayout.from_json(dict(layer.layout))
            assert (layout.bits, layout.dtype) == (16, "bfloat16")
            for expert in range(4):
                record = torch.frombuffer(
                    source.record(ExpertKey(index, expert)), dtype=torch.uint8
                )
                for name, tensor in decode(layout, record, torch.bfloat16).items():
                    want = original(model, layer.path, name, expert, layer.transposed)
                    assert torch.equal(tensor, want), name


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16)])
def test_unquantized_records_are_as_wide_as_their_source(
    dtype: torch.dtype, bits: int, folder: Path
) -> None:
    save("qwen3_moe", folder, dtype, moe_intermediate_size=48)  # no group divides 48
    with open_checkpoint(folder, bits=16) as source:
        layout = source.layouts[1]
        assert source.quantization == {"bits": bits}
        assert (layout.bits, layout.dtype) == (bits, source.dtype)
        key = ExpertKey(1, 2)
        record = torch.frombuffer(source.record(key), dtype=torch.uint8)
        for name, tensor in decode(layout, record, dtype).items():
            assert torch.equal(tensor, source.expert(key)[name])


def test_experts_of_mixed_types_are_never_rounded(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    key = next(key for key in sorted(tensors) if "experts.2.down_proj" in key)
    tensors[key] = tensors[key].float() + 1e-6
    save_file(tensors, qwen / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(qwen, bits=16) as source:
        assert source.dtype == "float32"
        assert source.quantization == {"bits": 32}
        for expert in range(4):
            record = torch.frombuffer(source.record(ExpertKey(0, expert)), dtype=torch.uint8)
            down = decode(source.layouts[0], record, torch.float32)["down_proj"]
            assert torch.equal(down, source.expert(ExpertKey(0, expert))["down_proj"].float())


def test_what_decides_a_record_is_told_apart(qwen: Path) -> None:
    found = []
    for bits, fitted in ((4, True), (4, False), (8, True), (8, False), (16, True)):
        with open_checkpoint(qwen, group=32, bits=bits, fitted=fitted) as source:
            found.append((dict(source.quantization), bytes(source.record(ExpertKey(0, 0)))))
    assert [quantization for quantization, _ in found] == [
        {"bits": 4, "group": 32, "balanced": True},
        {"bits": 4, "group": 32, "scales": "minmax"},
        {"bits": 8, "group": 32, "balanced": True},
        {"bits": 8, "group": 32, "scales": "minmax"},
        {"bits": 16},
    ]
    assert len({record for _, record in found}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_types(dtype: torch.dtype, folder: Path) -> None:
    save("qwen3_moe", folder, dtype)
    with open_checkpoint(folder) as source:
        assert source.dtype == str(dtype).removeprefix("torch.")
        assert source.expert(ExpertKey(0, 0))["down_proj"].dtype == dtype


def test_sharded_checkpoints(folder: Path) -> None:
    save("qwen3_moe", folder)
    with open_checkpoint(folder) as one:
        whole = [bytes(one.record(ExpertKey(1, e))) for e in range(4)]
    shard(folder)
    with open_checkpoint(folder) as source:
        assert [bytes(source.record(ExpertKey(1, e))) for e in range(4)] == whole
        shards = [name for name in source.source.files if name.endswith(".safetensors")]
        assert len(shards) == 3


def shard(folder: Path) -> None:
    """Split model.safetensors into three shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        part = {key: tensors[key] for key in sorted(tensors)[i::3]}
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_group_is_chosen_per_matrix(folder: Path) -> None:
    save("qwen3_moe", folder)
    with open_checkpoint(folder) as source:
        assert {m.name: m.group for m in source.layouts[0].matrices} == {
            "gate_up_proj": 64, "down_proj": 32,
        }  # fmt: skip
    with open_checkpoint(folder, group=32) as source:
        assert {m.group for m in source.layouts[0].matrices} == {32}


def test_a_width_that_no_group_divides_is_refused(folder: Path) -> None:
    save("qwen3_moe", folder, moe_intermediate_size=48)
    with pytest.raises(ModelError, match="down_proj: 48 inputs"):
        open_checkpoint(folder)


def test_the_source_is_told_apart_by_config_and_shards(qwen: Path) -> None:
    def files() -> dict[str, str]:
        with open_checkpoint(qwen, source_id="org/name", revision="abc") as source:
            assert (source.source.id, source.source.revision) == ("org/name", "abc")
            return dict(source.source.files)

    before = files()
    assert files() == before
    edit_config(qwen, rope_theta=12345.0)
    assert files()["config.json"] != before["config.json"]
    assert files()["model.safetensors"] == before["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "not a Mixture-of-Experts"),
        ("llama4_text", "an MoE outside of transformers' experts interface"),
    ],
)
def test_families_without_the_interface(family: str, message: str, folder: Path) -> None:
    change = {} if family == "llama" else {"num_local_experts": 4, "intermediate_size_mlp": 64}
    save(family, folder, intermediate_size=64, head_dim=16, **change)
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(folder)
    assert family in str(caught.value)


@pytest.mark.parametrize("which", ["first", "last", "all up"])
def test_a_missing_expert_tensor_is_named(qwen: Path, which: str) -> None:
    tensors = load_file(qwen / "model.safetensors")
    keys = sorted(key for key in tensors if ".mlp.experts." in key)
    if which == "all up":
        gone = [key for key in keys if "up_proj" in key]
    else:
        gone = [keys[0 if which == "first" else -1]]
    for key in gone:
        del tensors[key]
    save_file(tensors, qwen / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.experts\.\w+, expert \d: tensors"
    ):
        open_checkpoint(qwen)


@pytest.mark.parametrize("change", ["shape", "dtype", "too many"])
def test_expert_tensors_that_do_not_fit(qwen: Path, change: str) -> None:
    tensors = load_file(qwen / "model.safetensors")
    key = next(key for key in sorted(tensors) if "experts.2.down_proj" in key)
    if change == "shape":
        tensors[key] = tensors[key][:-1].contiguous()
    elif change == "dtype":
        tensors[key] = tensors[key].to(torch.int8)
    else:
        tensors[key.replace("experts.2.", "experts.9.")] = tensors[key].clone()
    save_file(tensors, qwen / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts\."):
        open_checkpoint(qwen)


def test_nan_weights_name_layer_expert_and_parameter(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    key = next(key for key in sorted(tensors) if "experts.2.down_proj" in key)
    tensors[key][3, 5] = float("nan")
    save_file(tensors, qwen / "model.safetensors")
    with (
        open_checkpoint(qwen) as source,
        pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts, expert 2: down_proj holds NaN"),
    ):
        source.record(ExpertKey(0, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no_such_family"},
        {"model_type": None},
        {"model_type": ["qwen2_moe"]},
        {"model_type": "clip"},
        {"num_hidden_layers": 10**12},
        {"num_experts": 10**9},
        {"num_experts": "many"},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_act": "no_such_function"},
        {"num_hidden_layers": None},
        {"rope_parameters": 7},
        {"layer_types": 5},
        {"model_type": "unknown_x", "auto_map": {"AutoConfig": "evil.Config"}},
    ],
)
def test_hostile_configs(qwen: Path, change: dict[str, object]) -> None:
    (qwen / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(qwen, **change)
    with pytest.raises((ModelError, FormatError)) as caught:
        open_checkpoint(qwen)
    assert "\n" not in str(caught.value)


def test_a_known_family_never_runs_the_repositorys_code(qwen: Path) -> None:
    (qwen / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit_config(
        qwen,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with open_checkpoint(qwen) as source:
        assert source.layers


def test_damaged_folders(qwen: Path) -> None:
    for text in ("", "[]", "{", '{"a":1,"a":2}'):
        (qwen / "config.json").write_text(text)
        with pytest.raises(FateError, match=r"config\.json"):
            open_checkpoint(qwen)
    (qwen / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(qwen)


def test_only_safetensors(qwen: Path) -> None:
    (qwen / "model.safetensors").rename(qwen / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        open_checkpoint(qwen)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing shard", "shard is missing"),
        ("truncated", "its header describes"),
        ("missing tensor", "of the index is missing"),
        ("traversal", "no plain safetensors file"),
        ("twice", "is also in another shard"),
        ("no map", "weight_map must be"),
    ],
)
def test_damaged_shards(qwen: Path, damage: str, message: str) -> None:
    shard(qwen)
    second = qwen / "model-00002-of-00003.safetensors"
    index = qwen / "model.safetensors.index.json"
    if damage == "missing shard":
        second.unlink()
    elif damage == "truncated":
        second.write_bytes(second.read_bytes()[:-10])
    elif damage == "missing tensor":
        tensors = load_file(second)
        save_file(dict(list(tensors.items())[1:]), second)
    elif damage == "twice":
        save_file(load_file(second) | load_file(qwen / "model-00001-of-00003.safetensors"), second)
    elif damage == "traversal":
        index.write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    else:
        index.write_text("{}")
    with pytest.raises((ModelError, FormatError), match=message):
        open_checkpoint(qwen)


def test_a_shard_cut_short_while_we_read(qwen: Path, tmp_path: Path) -> None:
    with open_checkpoint(qwen) as source:
        path = qwen / "model.safetensors"
        path.write_bytes(path.read_bytes()[:20_000])
        with pytest.raises(FormatError, match=r"model\.safetensors: ends at"):
            convert(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_store_is_no_checkpoint(qwen: Path, tmp_path: Path) -> None:
    with open_checkpoint(qwen) as source:
        convert(source, tmp_path / "store")
    with pytest.raises(ModelError, match="already a store"):
        open_checkpoint(tmp_path / "store")


def test_layers_a_model_never_loads_are_left_out(folder: Path) -> None:
    save("deepseek_v3", folder)
    tensors = load_file(folder / "model.safetensors")
    extra = "model.layers.61.mlp.experts.0.up_proj.weight"
    tensors[extra] = torch.zeros(32, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(folder) as source:
        assert extra not in {tensor.name for tensor in source.resident}
        assert len(source.layers) == 1


def test_source_is_an_expert_source(qwen: Path) -> None:
    with open_checkpoint(qwen) as source:
        assert isinstance(source, CheckpointSource)
        layer = source.layers[0]
        assert len(source.record(ExpertKey(0, 0))) == layer.record_bytes
        assert RecordLayout.from_json(dict(layer.layout)) == source.layouts[0]
        assert source.quantization == {"bits": 4, "group": 64, "balanced": True}


PEAK = """
import sys
from pathlib import Path
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.store.convert import convert

def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

folder, small, out = map(Path, sys.argv[1:])
with open_checkpoint(small) as source:
    convert(source, out / "store-small", jobs=JOBS)  # imports, thread pools and torch's own buffers
before = peak()
with open_checkpoint(folder) as source:
    convert(source, out / "store-large", jobs=JOBS)
    layer = source.layers[0]
    floats = 4 * sum(source.expert_layers[0].params[n][1] * source.expert_layers[0].params[n][2]
                     for n in layer.params) * layer.num_experts
print(peak() - before, floats, floats * len(source.layers))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc for VmHWM")
@pytest.mark.parametrize("jobs", [1, 4])
def test_convert_holds_one_expert_per_job_and_never_a_layer(
    jobs: int, folder: Path, tmp_path: Path
) -> None:
    save("qwen3_moe", tmp_path / "small")
    size = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    save("qwen3_moe", folder, num_hidden_layers=6, **size)
    folders = (folder, tmp_path / "small", tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PEAK.replace("JOBS", str(jobs)), *map(str, folders)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    grown, layer_bytes, model_bytes = map(int, run.stdout.split())
    assert model_bytes > 250e6
    assert grown < layer_bytes  # the promise is two layers in float32 and 1 GiB
