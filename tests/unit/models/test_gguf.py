"""Is a GGUF read as the model it is: every family, every type, the source's own grid kept?"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoConfig

from fate_moe.engine.prepare import convert_model
from fate_moe.errors import FateError, FormatError, ModelError
from fate_moe.models.checkpoint import CheckpointSource, open_checkpoint
from fate_moe.models.load import load_tokenizer, own_memory
from fate_moe.quant.codec import decode
from fate_moe.store.convert import is_made_from
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.conftest import Open
from tests.tiny import make_tokenizer
from tests.unit.models.gguf_files import (
    FAMILIES,
    give_back,
    make_model,
    packed,
    split_tensors,
    write_gguf,
)

PROMPT = torch.tensor([[5, 81, 12, 260, 33, 7, 99, 140, 3, 61]])


def only(type_: Type) -> Any:
    return lambda name: type_


def mixed(name: str) -> Type:
    """Types as in published files: precise where it costs little."""
    if "exps" in name:
        return Type.Q8_0 if "down" in name else Type.Q4_0
    return Type.F32 if "inp" in name else Type.Q5_0 if "attn" in name else Type.F16


def want(family: str, model: Any, values: dict[str, Tensor], *, split_kv: bool = False) -> Tensor:
    """The logits of plain transformers with the values of the file."""
    give_back(family, model, values, split_kv=split_kv)
    model.config._attn_implementation = "eager"
    model.set_experts_implementation("eager")
    own_memory(model, whole=True)
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(PROMPT).logits
    return logits


def originals(family: str, model: Any) -> dict[str, Tensor]:
    """The model's tensors by their GGUF name, in memory of their own."""
    found = split_tensors(family, model, split_kv=False)
    return {name: tensor.clone() for name, tensor in found.items()}


def convert(path: Path, bits: int = 4) -> Path:
    store, _ = convert_model(
        str(path), path.parent / f"store-{bits}", cache_dir=path.parent, bits=bits
    )
    return store


def check(store: Path, expected: Tensor, open_engine: Open) -> None:
    assert verify(store).is_intact
    engine = open_engine(store, experts="75%", compute="eager", dtype="float32")
    engine.model.config._attn_implementation = "eager"
    with torch.no_grad():
        assert torch.equal(engine.model(PROMPT).logits, expected)
    assert engine.report().misses > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_values_make_the_output_of_plain_transformers(
    family: str, tmp_path: Path, open_engine: Open
) -> None:
    model, path = make_model(family), tmp_path / "model.gguf"
    values = write_gguf(path, family, model, mixed)
    expected = want(family, model, values)
    store = convert(path, 16)
    source = read_manifest(store).quantization
    assert source == {"bits": 32, "source": {"Q4_0": "dequantized", "Q8_0": "dequantized"}}
    check(store, expected, open_engine)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_split_by_newer_converters(
    family: str, tmp_path: Path, open_engine: Open
) -> None:
    model, path = make_model(family), tmp_path / "model.gguf"
    values = write_gguf(path, family, model, only(Type.F16), split_kv=True)
    assert "blk.0.attn_k_b.weight" in values
    expected = want(family, model, values, split_kv=True)
    check(convert(path, 16), expected, open_engine)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_q_k_and_v_written_as_one_tensor(family: str, tmp_path: Path, open_engine: Open) -> None:
    model, path = make_model(family), tmp_path / "model.gguf"
    written = write_gguf(path, family, model, only(Type.F32), fused=True)
    assert "blk.0.attn_qkv.weight" in written
    assert ("blk.0.attn_qkv.bias" in written) == (family != "mixtral")
    values = originals(family, model)
    check(convert(path, 16), want(family, model, values), open_engine)


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe", "olmoe"])
def test_biases_of_attention_that_only_the_tensors_tell(
    family: str, tmp_path: Path, open_engine: Open
) -> None:
    model, path = make_model(family, attention_bias=True), tmp_path / "model.gguf"
    values = write_gguf(path, family, model, only(Type.F32))
    assert values["blk.0.attn_q.bias"].std() > 0
    check(convert(path, 16), want(family, model, values), open_engine)


def test_the_gate_of_a_shared_expert_as_a_vector(tmp_path: Path, open_engine: Open) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "model.gguf"
    name = "ffn_gate_inp_shexp.weight"
    values = originals("qwen2_moe", model)

    def add(writer: Any) -> None:
        for layer in (0, 1):  # ggml itself drops a last dimension of one
            writer.add_tensor(f"blk.{layer}.{name}", values[f"blk.{layer}.{name}"][0].numpy())

    write_gguf(path, "qwen2_moe", model, only(Type.F32), drop=name, extra=add)
    check(convert(path, 16), want("qwen2_moe", model, values), open_engine)


KEPT = [(family, Type.Q4_0, 4) for family in FAMILIES] + [
    (family, type_, 8)
    for family in ("qwen3_moe", "gpt_oss")
    for type_ in (Type.Q4_0, Type.Q5_0, Type.Q8_0)
]


@pytest.mark.parametrize(("family", "type_", "bits"), KEPT)
def test_codes_are_kept_and_make_the_same_output(
    family: str, type_: Type, bits: int, tmp_path: Path, open_engine: Open
) -> None:
    model, path = make_model(family), tmp_path / "model.gguf"
    values = write_gguf(path, family, model, only(type_))
    expected = want(family, model, values)
    store = convert(path, bits)
    manifest = read_manifest(store)
    assert manifest.quantization == {"bits": bits, "group": 64, "source": {type_.name: "kept"}}
    assert {m["group"] for m in manifest.layers[0].layout["matrices"]} == {32}  # type: ignore[attr-defined]
    check(store, expected, open_engine)


def relative_error(source: CheckpointSource, model: Any) -> float:
    """Of all experts' records, against the values that the model holds."""
    lost = total = 0.0
    for index, layer in enumerate(source.layers):
        module = model.get_submodule(layer.path)
        for expert in range(layer.num_experts):
            record = torch.frombuffer(
                bytearray(source.record(ExpertKey(index, expert))), dtype=torch.uint8
            )
            for name, found in decode(source.layouts[index], record, torch.float32).items():
                value = getattr(module, name)[expert]
                value = value.mT if layer.transposed and value.dim() == 2 else value
                lost += (found - value).square().sum().item()
                total += value.square().sum().item()
    return (lost / total) ** 0.5


@pytest.mark.parametrize("type_", [Type.Q4_1, Type.Q4_K])
def test_grids_with_a_minimum_lose_next_to_nothing(type_: Type, tmp_path: Path) -> None:
    model, path = (
        make_model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, head_dim=64),
        tmp_path / "m.gguf",
    )
    values = write_gguf(path, "qwen3_moe", model, only(type_))
    give_back("qwen3_moe", model, values, split_kv=False)
    with open_checkpoint(path) as source:
        assert source.quantization["source"] == {type_.name: "requantized"}
        assert {m.group for m in source.layouts[0].matrices} == {32}
        assert relative_error(source, model) < 1e-3
    with open_checkpoint(path, bits=8) as source:
        assert relative_error(source, model) < 1e-3


def test_min_max_scales_are_a_yardstick_and_keep_nothing(tmp_path: Path) -> None:
    model, path = make_model("qwen3_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen3_moe", model, only(Type.Q4_0))
    with open_checkpoint(path, fitted=False) as source:
        assert source.quantization == {
            "bits": 4, "group": 64, "scales": "minmax", "source": {"Q4_0": "requantized"},
        }  # fmt: skip
        assert [m.group for m in source.layouts[0].matrices] == [64, 32]


def test_gate_and_up_of_two_types_are_one_packing(tmp_path: Path) -> None:
    model, path = make_model("qwen3_moe"), tmp_path / "m.gguf"
    pick = {"gate": Type.Q4_0, "up": Type.Q5_1, "down": Type.F16}
    write_gguf(
        path,
        "qwen3_moe",
        model,
        lambda n: next((t for k, t in pick.items() if f"_{k}_exps" in n), Type.F32),
    )
    with open_checkpoint(path) as source:
        assert source.quantization["source"] == {"Q4_0+Q5_1": "requantized"}
        assert source.expert(ExpertKey(0, 0))["down_proj"].dtype == torch.float16


ALL = [t for t in Type if t in gguf.quants._type_traits] + [Type.F32, Type.F16]  # type: ignore[attr-defined]


@pytest.mark.parametrize("type_", ALL, ids=lambda t: t.name)
def test_every_type_is_read_expert_by_expert(type_: Type, tmp_path: Path) -> None:
    model = make_model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1)
    path = tmp_path / "m.gguf"
    values = write_gguf(path, "qwen3_moe", model, lambda n: type_ if "exps" in n else Type.F32)
    with open_checkpoint(path, bits=16) as source:
        for expert in range(4):
            found = source.expert(ExpertKey(0, expert))
            gate, up, down = (
                values[f"blk.0.ffn_{k}_exps.weight"][expert] for k in ("gate", "up", "down")
            )
            for have, need in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
                value = found[have].float()
                assert torch.equal(value.nan_to_num(7.0), need.nan_to_num(7.0))
                assert value.std() > 0 or not value.isfinite().all()
            kept = {"F16": torch.float16, "BF16": torch.bfloat16}
            assert found["down_proj"].dtype == kept.get(type_.name, torch.float32)


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    whole, split = tmp_path / "m.gguf", tmp_path / "split" / "m.gguf"
    split.parent.mkdir()
    write_gguf(whole, "qwen3_moe", model, only(Type.Q8_0))
    write_gguf(split, "qwen3_moe", model, only(Type.Q8_0), files=4)
    files = sorted(split.parent.iterdir())
    assert len(files) == 4
    records = []
    for path in (whole, files[2]):
        with open_checkpoint(path) as source:
            records.append(
                [bytes(source.record(ExpertKey(i, e))) for i in (0, 1) for e in range(4)]
            )
    assert records[0] == records[1]
    files[3].rename(tmp_path / "away")
    with pytest.raises(ModelError, match="00004-of-00004.gguf: file is missing"):
        open_checkpoint(files[0])
    alone = tmp_path / "alone.gguf"
    files[0].rename(alone)
    with pytest.raises(ModelError, match="is one of 4 files"):
        open_checkpoint(alone)


def test_residents_are_the_models_own_bit_for_bit(tmp_path: Path) -> None:
    model, path = make_model("mixtral"), tmp_path / "m.gguf"
    values = write_gguf(path, "mixtral", model, only(Type.BF16))
    give_back("mixtral", model, values, split_kv=False)
    state = model.state_dict()
    with open_checkpoint(path) as source:
        assert {tensor.dtype for tensor in source.resident} == {"BF16", "F32"}
        assert {t.name for t in source.resident} == {n for n in state if ".experts." not in n}
        for tensor in source.resident:
            data = bytearray(b"".join(source.read_resident(tensor.name)))
            dtype = torch.bfloat16 if tensor.dtype == "BF16" else torch.float32
            found = torch.frombuffer(data, dtype=dtype).view(tensor.shape)
            assert torch.equal(found.float(), state[tensor.name]), tensor.name


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen2_moe", model, only(Type.Q8_0))
    store = convert(path)
    tokenizer = load_tokenizer(store)
    ids = tokenizer("Fate ab</s>")["input_ids"]
    assert tokenizer.decode(ids) == "Fate ab</s>"
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(ids)[4] == "Ġa"  # the merge
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )


@pytest.mark.parametrize(
    ("cut", "text", "pieces"),
    [
        ("deepseek-v3", "12345 ab", ["1", "2", "3", "4", "5", "Ġa", "b"]),
        ("refact", "12 ab", ["1", "2", "Ġa", "b"]),
        ("olmo", "12 ab", ["1", "2", "Ġa", "b"]),
    ],
)
def test_other_ways_to_cut_words(cut: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen2_moe", model, only(Type.Q8_0), tokenizer=cut)
    with open_checkpoint(path) as source:
        tokenizer = load_tokenizer(source.folder)
        assert tokenizer.tokenize(text) == pieces
        words = [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert words[0] == {"deepseek-v3": "123", "refact": "1", "olmo": "12"}[cut]


@pytest.mark.parametrize(
    ("tokenizer", "extra", "says"),
    [
        ("", None, "holds no tokenizer"),
        ("klingon", None, "cuts words as 'klingon', which is unknown"),
        ("", lambda w: (w.add_tokenizer_model("rwkv"), w.add_token_list(["a"])), "refuses its"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_taken_from_beside(
    tokenizer: str, extra: Any, says: str, tmp_path: Path
) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen2_moe", model, only(Type.Q8_0), tokenizer=tokenizer, extra=extra)
    with pytest.raises(ModelError, match=f"{says}.*; put the model's tokenizer.json"):  # noqa: SIM117
        with open_checkpoint(path) as source:
            assert source.folder
    make_tokenizer().save_pretrained(tmp_path)
    with open_checkpoint(path) as source:
        assert (
            load_tokenizer(source.folder)("Hi")["input_ids"] == make_tokenizer()("Hi")["input_ids"]
        )


def test_a_tokenizer_beside_does_not_take_the_place_of_the_files_own(tmp_path: Path) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen2_moe", model, only(Type.Q8_0))
    with open_checkpoint(path) as source:
        alone = load_tokenizer(source.folder)("Fate a</s>")["input_ids"]
    make_tokenizer().save_pretrained(tmp_path)
    assert make_tokenizer()("Fate a</s>")["input_ids"] != alone
    with open_checkpoint(path) as source:
        assert load_tokenizer(source.folder)("Fate a</s>")["input_ids"] == alone


def test_a_store_that_is_there_needs_no_tokenizer(tmp_path: Path) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen2_moe", model, only(Type.Q8_0))
    store = convert(path)
    with open_checkpoint(path) as source:
        assert is_made_from(read_manifest(store), source)
        assert source.pending is not None
        assert (source.folder / "tokenizer.json").is_file()
        assert source.pending is None


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    model, path = make_model("qwen2_moe"), tmp_path / "m.gguf"
    tokens = [str(i) for i in range(289)]
    write_gguf(
        path, "qwen2_moe", model, only(Type.Q8_0), tokenizer="",
        extra=lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(tokens)),
    )  # fmt: skip
    with pytest.raises(FormatError, match="289 tokens, token_embd.weight has 288 rows"):
        open_checkpoint(path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"drop": "ffn_up_exps.weight"}, "tensor blk.0.ffn_up_exps.weight is missing"),
    ({"drop": "blk.1.ffn_norm.weight"}, "tensor blk.1.ffn_norm.weight is missing"),
    ({"drop": "token_embd.weight"}, "tensor token_embd.weight is missing"),
    ({"extra": lambda w: w.add_tensor("rope_freqs.bias", np.ones(8, np.float32))},
     "rope_freqs.bias belongs to no parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "says"), REFUSED, ids=lambda v: "" if isinstance(v, dict) else v)
def test_what_cannot_be_read_is_named(how: dict[str, Any], says: str, tmp_path: Path) -> None:
    model, path = make_model("qwen3_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen3_moe", model, only(Type.Q8_0), **how)
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_architectures_and_dense_models_are_refused(tmp_path: Path) -> None:
    for arch, says in (("mamba", "none of the MoE architectures"), ("llama", "not a Mixture")):
        path = tmp_path / f"{arch}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelError, match=says):
            open_checkpoint(path)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = make_model("qwen3_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen3_moe", model, only(Type.F32))
    # The first layer's norms lie in order; a config of another width fits none of them.
    data = bytearray(path.read_bytes())
    key = b"qwen3moe.embedding_length"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (96).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match="does not make model.embed_tokens.weight"):
        open_checkpoint(path)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    model, path = make_model("qwen3_moe"), tmp_path / "m.gguf"
    write_gguf(path, "qwen3_moe", model, only(Type.F16))
    with open_checkpoint(path) as source:
        assert source.folder.parent == tmp_path / "scratch"
    write_gguf(path, "qwen3_moe", model, only(Type.F16), drop="output_norm.weight")
    with pytest.raises(FateError):
        open_checkpoint(path)
    assert not list((tmp_path / "scratch").iterdir())


def test_damaged_scales_are_found(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    for type_ in (Type.Q4_0, Type.Q4_1):
        path = tmp_path / f"{type_.name}.gguf"
        write_gguf(path, "qwen3_moe", model, only(type_))
        with open_checkpoint(path) as source:
            tensor = source._weights._gguf.tensors["blk.1.ffn_down_exps.weight"]  # type: ignore[attr-defined]
            data = bytearray(path.read_bytes())
            data[tensor.offset : tensor.offset + 2] = np.float16("nan").tobytes()
            path.write_bytes(data)
            with pytest.raises(
                ModelError, match=r"layers\.1\.mlp\.experts, expert 0: down_proj holds NaN"
            ):
                source.record(ExpertKey(1, 0))
            path.write_bytes(data[: tensor.offset + 8])
            with pytest.raises(FormatError, match="blk.1.ffn_down_exps.weight; it changed"):
                source.record(ExpertKey(1, 0))


def test_packed_matches_gguf_itself() -> None:
    """The helper's own check: a type that gguf writes is written by gguf."""
    data = packed(torch.randn(4, 64), Type.Q4_0)
    assert data.shape == (4, 36)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_models_own(family: str, tmp_path: Path) -> None:
    model, path = make_model(family), tmp_path / "m.gguf"
    write_gguf(path, family, model, only(Type.F16))
    with open_checkpoint(path) as source:
        found = AutoConfig.from_pretrained(source.folder).to_dict()
    wanted = model.config.to_dict()
    silent = {"dtype", "transformers_version", "architectures", "_name_or_path"}
    assert found["dtype"] == "float16"
    differ = {key for key in wanted if found.get(key) != wanted[key]} - silent
    unsaid = {"mixtral": {"head_dim"}, "deepseek_v2": {"n_group", "topk_group"}}  # None, unused
    assert differ <= unsaid.get(family, set())


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 65536, "the config has 65536 layers, the last has no tensors"),
        ("block_count", 0, "qwen3moe.block_count is 0, must be a count"),
        ("expert_count", 9, "expert_count is 9, the tensors have 4"),
        ("embedding_length", 1 << 31, "embedding_length is 2147483648, must be a count"),
    ],
)
def test_counts_are_held_against_the_tensors(
    key: str, value: int, says: str, tmp_path: Path
) -> None:
    path, name = tmp_path / "m.gguf", f"qwen3moe.{key}".encode()
    write_gguf(path, "qwen3_moe", make_model("qwen3_moe"), only(Type.F16))
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(FateError, match=says):
        open_checkpoint(path)
