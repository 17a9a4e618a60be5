"""Are FP8 and MXFP4 weights the values that transformers unpacks, and damaged ones refused?"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers import quantizer_finegrained_fp8

from fate_moe.engine.prepare import convert_model
from fate_moe.errors import FormatError, ModelError
from fate_moe.models import packed
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.load import own_memory, quiet_transformers
from fate_moe.models.packed import Packed, _find_fp8, _find_mxfp4, plain_config, unpack
from fate_moe.models.shards import Shards
from fate_moe.models.weights import FLOATS, Weights
from fate_moe.store.convert import SourceTensor
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.conftest import Open
from tests.unit.models.packing import BLOCK, pack_fp8, pack_mxfp4, spread, to_fp8, to_mxfp4
from tests.unit.models.test_checkpoint import edit_config, save, shard

Unpack = Callable[[dict[str, Tensor], object], Weights]

FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
MXFP4 = {"quant_method": "mxfp4"}
# With these sizes no block is ragged, which transformers could not read.
EVEN = {"kv_lora_rank": 24, "v_head_dim": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `fp8` (deepseek_v3), `fused` (granitemoe, FP8) and `mxfp4` (gpt_oss)."""
    root = tmp_path_factory.mktemp("packed")
    save("deepseek_v3", root / "plain-deepseek", **EVEN)
    save("granitemoe", root / "plain-granite")
    save("gpt_oss", root / "plain-gpt")
    pack_fp8(root / "plain-deepseek", root / "fp8")
    pack_fp8(root / "plain-granite", root / "fused")
    pack_mxfp4(root / "plain-gpt", root / "mxfp4")
    return root


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack a row or two at a time, as large matrices are unpacked in many bands."""
    monkeypatch.setattr(packed, "_BAND", 100)
    monkeypatch.setattr(packed, "_PIECE_BYTES", 1000)


def unpacked_by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Load through transformers' own dequantizing path."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    kind = Mxfp4Config if method == "mxfp4" else FineGrainedFP8Config
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=kind(dequantize=True)
        )


@pytest.fixture
def open_weights(tmp_path: Path) -> Iterator[Unpack]:
    """Write tensors, open them as a checkpoint of this quantization_config, and close it."""
    opened: list[Weights] = []

    def make(tensors: dict[str, Tensor], quantization: object) -> Weights:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        opened.append(unpack(Shards(tmp_path), tmp_path, quantization))
        return opened[-1]

    yield make
    for weights in opened:
        weights.close()


def joined(weights: Weights, name: str) -> Tensor:
    data = b"".join(bytes(piece) for piece in weights.pieces(name))
    shape = weights.tensors[name].shape
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(shape)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.usefixtures("small_bands")
def test_every_weight_is_what_transformers_unpacks(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = unpacked_by_transformers(models / name, monkeypatch).state_dict()
    with open_checkpoint(models / name, bits=16) as source:
        assert source.dtype == "bfloat16"
        seen = 0
        for tensor in source.resident:
            data = bytearray(b"".join(bytes(p) for p in source.read_resident(tensor.name)))
            found = torch.frombuffer(data, dtype=FLOATS[tensor.dtype]).view(tensor.shape)
            theirs = want[tensor.name]
            assert torch.equal(found.to(theirs.dtype), theirs), tensor.name
            seen += 1
        for index, layer in enumerate(source.expert_layers):
            for expert in range(layer.num_experts):
                for param, found in source.expert(ExpertKey(index, expert)).items():
                    theirs = want[f"{layer.path}.{param}"][expert]
                    theirs = theirs.mT if layer.transposed and theirs.dim() == 2 else theirs
                    assert found.dtype == torch.bfloat16
                    assert torch.equal(found, theirs), param
                    seen += 1
        assert seen > 20
        names = {tensor.name for tensor in source.resident}
        assert not [name for name in names if name.endswith(("_scale_inv", "_scales", "_blocks"))]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 96)])
@pytest.mark.usefixtures("small_bands")
def test_fp8_blocks(scale_dtype: torch.dtype, shape: tuple[int, ...], open_weights: Unpack) -> None:
    torch.manual_seed(1)
    codes, scales = to_fp8(torch.randn(shape) * torch.logspace(-3, 3, 96), [BLOCK, BLOCK])
    scales = scales.to(scale_dtype)
    weights = open_weights({"a.weight": codes, "a.weight_scale_inv": scales}, FP8)
    want = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert list(weights.tensors) == ["a.weight"]
    assert (weights.tensors["a.weight"].dtype, weights.tensors["a.weight"].shape) == ("BF16", shape)
    assert weights.packings == {"a.weight": "FP8"}
    assert torch.equal(weights.load("a.weight"), want)
    assert torch.equal(joined(weights, "a.weight"), want)
    for i in range(shape[0] if len(shape) == 3 else 2):
        assert torch.equal(weights.load("a.weight", i), want[i])


@pytest.mark.parametrize("rows", [1, 31, 33, 40, 95])
@pytest.mark.usefixtures("small_bands")
def test_a_block_at_a_ragged_edge_keeps_its_size(rows: int, open_weights: Unpack) -> None:
    torch.manual_seed(rows)
    codes, scales = to_fp8(torch.randn(2, rows, 70) * torch.logspace(-3, 3, 70), [BLOCK, 16])
    quantization = FP8 | {"weight_block_size": [BLOCK, 16]}
    weights = open_weights({"a": codes, "a_scale_inv": scales}, quantization)
    want = (codes.float() * spread(scales, [BLOCK, 16], rows, 70)).bfloat16()
    assert torch.equal(weights.load("a"), want)
    assert torch.equal(weights.load("a", 1), want[1])
    assert torch.equal(joined(weights, "a"), want)


@pytest.mark.parametrize(
    ("scale", "block"),
    [
        (torch.tensor(0.37), None),
        (torch.tensor([0.37]), None),
        (torch.tensor([[0.37]]), None),
        (torch.tensor(0.37), [BLOCK, BLOCK]),
    ],
)
def test_fp8_with_one_scale_per_tensor(
    scale: Tensor, block: list[int] | None, open_weights: Unpack
) -> None:
    codes = torch.randn(40, 70).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": codes, "a.weight_scale": scale, "a.input_scale": torch.ones(1),
        "a.activation_scale": torch.ones(1), "b.input_scale": torch.ones(1),
    }  # fmt: skip
    weights = open_weights(tensors, {"quant_method": "fp8", "weight_block_size": block})
    assert sorted(weights.tensors) == ["a.weight", "b.input_scale"]
    assert torch.equal(weights.load("a.weight"), (codes.float() * 0.37).bfloat16())


def test_a_fused_tensor_with_one_scale_per_expert(open_weights: Unpack) -> None:
    codes = torch.randn(3, 8, 70).to(torch.float8_e4m3fn)
    scales = torch.tensor([0.5, 3.0, 0.37])
    none = {"quant_method": "fp8", "weight_block_size": None}
    weights = open_weights({"a": codes, "a_scale_inv": scales}, none)
    want = (codes.float() * scales.view(3, 1, 1)).bfloat16()
    assert torch.equal(weights.load("a"), want)
    assert torch.equal(weights.load("a", 2), want[2])


def test_blocks_are_128_wide_where_the_config_names_no_size(open_weights: Unpack) -> None:
    codes, scales = to_fp8(torch.randn(130, 200), [128, 128])
    weights = open_weights({"a": codes, "a_scale_inv": scales}, {"quant_method": "fp8"})
    assert scales.shape == (2, 2)
    want = (codes.float() * spread(scales, [128, 128], 130, 200)).bfloat16()
    assert torch.equal(weights.load("a"), want)


@pytest.mark.usefixtures("small_bands")
def test_every_byte_and_every_exponent_of_mxfp4(open_weights: Unpack) -> None:
    # Of larger exponents than 252 some of the 16 values are beyond bfloat16.
    scales = torch.arange(253, dtype=torch.uint8).repeat_interleave(16).view(2, 2024, 1)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(253, 1).view(2, 2024, 1, 16)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    weights = open_weights({"a_blocks": blocks, "a_scales": scales}, MXFP4)
    assert weights.tensors["a"].shape == (2, 32, 2024)
    assert weights.packings == {"a": "MXFP4"}
    assert torch.equal(weights.load("a", 1), want[1])
    assert torch.equal(weights.load("a"), want)
    assert torch.equal(joined(weights, "a"), want)
    signs = weights.load("a").view(torch.int16) < 0
    assert torch.equal(signs, want.view(torch.int16) < 0)  # minus zero, too


def test_mxfp4_values_are_the_nearest_of_their_grid(open_weights: Unpack) -> None:
    torch.manual_seed(2)
    plain = torch.randn(2, 6, 64)
    blocks, scales = to_mxfp4(plain)
    weights = open_weights({"a_blocks": blocks, "a_scales": scales}, MXFP4)
    error = (weights.load("a").float().mT - plain).norm() / plain.norm()
    assert 0.05 < error < 0.2


def unpacked_by_index(folder: Path) -> dict[str, Tensor]:
    """What FP8 blocks hold, each weight by its place; transformers does not unpack fused ones."""
    tensors = load_file(folder / "model.safetensors")
    scales = {name.removesuffix("_scale_inv"): t for name, t in tensors.items() if "_scale" in name}
    for name, scale in scales.items():
        spread_out = spread(scale, [BLOCK, BLOCK], *tensors[name].shape[-2:])
        tensors[name] = (tensors[name].float() * spread_out).bfloat16()
    return {name: tensor for name, tensor in tensors.items() if "_scale" not in name}


def reference(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Plain transformers in float32, from a checkpoint of the unpacked weights in bfloat16."""
    if folder.name == "fused":
        tensors = unpacked_by_index(folder)
    else:
        tensors = dict(unpacked_by_transformers(folder, monkeypatch).state_dict())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, experts_implementation="eager"
        )
    own_memory(model, whole=True)
    return model.eval()


@pytest.mark.parametrize(("name", "kind"), [("fp8", "FP8"), ("fused", "FP8"), ("mxfp4", "MXFP4")])
def test_output_equals_plain_transformers(
    name: str, kind: str, models: Path, tmp_path: Path, open_engine: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store, manifest = convert_model(
        str(models / name), tmp_path / "store", cache_dir=tmp_path, bits=16
    )
    assert manifest.quantization == {"bits": 16, "source": {kind: "dequantized"}}
    assert manifest.dtype == "bfloat16"
    same = reference(models / name, tmp_path / "plain", monkeypatch)
    prompt = torch.tensor([[5, 17, 42, 9, 33, 60, 2, 11]])
    engine = open_engine(store, policy="demand", experts="75%", dtype="float32")
    with torch.no_grad():
        found, want = engine.model(prompt).logits, same(prompt).logits
    assert torch.equal(found, want)
    assert engine.report().misses > 0


@pytest.mark.parametrize(("name", "kind"), [("fp8", "FP8"), ("mxfp4", "MXFP4")])
def test_a_quantized_store(
    name: str, kind: str, models: Path, tmp_path: Path, open_engine: Open
) -> None:
    store, manifest = convert_model(str(models / name), tmp_path / "store", cache_dir=tmp_path)
    balanced = {"balanced": True} if kind == "FP8" else {}  # gpt-oss is not linear in up
    source = {kind: "requantized"}
    assert manifest.quantization == {"bits": 4, "group": 64, **balanced, "source": source}
    assert read_manifest(store) == manifest
    assert verify(store).is_intact
    config = json.loads((store / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    again = convert_model(str(models / name), tmp_path / "store", cache_dir=tmp_path)
    assert again[1] == manifest  # found, not refused as another model's
    logits = open_engine(store, experts="75%").model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_the_config_names_the_dtype_of_unpacked_weights(models: Path) -> None:
    config = {"model_type": "x", "text_config": {"quantization_config": FP8, "a": 1}}
    assert json.loads(plain_config(json.dumps(config).encode())) == {
        "model_type": "x", "text_config": {"a": 1}, "dtype": "bfloat16",
    }  # fmt: skip
    kept = {"torch_dtype": "float16", "quantization_config": {}}
    assert json.loads(plain_config(json.dumps(kept).encode())) == {"torch_dtype": "float16"}
    for text in (b'{"a":  1}', b'{ "dtype" : "float16" }'):
        assert plain_config(text) == text


def test_a_packed_checkpoint_in_shards(models: Path, tmp_path: Path) -> None:
    with open_checkpoint(models / "fp8") as one:
        whole = bytes(one.record(ExpertKey(0, 3)))
    folder = pack_fp8(models / "plain-deepseek", tmp_path / "shards")
    shard(folder)
    with open_checkpoint(folder) as source:
        assert bytes(source.record(ExpertKey(0, 3))) == whole


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp8"])
def test_other_methods_are_refused_by_name(method: str, models: Path, tmp_path: Path) -> None:
    folder = pack_mxfp4(models / "plain-gpt", tmp_path / "model")
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=rf"quantized \({method}\): only fp8 and mxfp4"):
        open_checkpoint(folder)


@pytest.mark.parametrize("quantization", [7, [], {}, {"quant_method": ["fp8"]}, "fp8"])
def test_configs_that_name_no_method(quantization: object, models: Path, tmp_path: Path) -> None:
    folder = pack_mxfp4(models / "plain-gpt", tmp_path / "model")
    edit_config(folder, quantization_config=quantization)
    with pytest.raises(ModelError, match="only fp8 and mxfp4 are read") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "block",
    [0, [], [128], [128, 128, 1], [0, 128], [-1, 1], [True, 2], [1.5, 2], "no", [1 << 40, 1]],
)
def test_hostile_block_sizes(block: object, models: Path, tmp_path: Path) -> None:
    folder = pack_fp8(models / "plain-granite", tmp_path / "model")
    edit_config(folder, quantization_config=FP8 | {"weight_block_size": block})
    with pytest.raises(FormatError, match=r"config\.json: weight_block_size is"):
        open_checkpoint(folder)


CODES = torch.ones(40, 70).to(torch.float8_e4m3fn)
BLOCKS = torch.zeros(2, 8, 3, 16, dtype=torch.uint8)
SCALES = torch.full((2, 8, 3), 127, dtype=torch.uint8)
FP8_DAMAGE: dict[str, dict[str, Tensor | None]] = {
    r"a\.weight is FP8, and its scale a\.weight_scale_inv is missing": {"a.weight_scale_inv": None},
    r"a\.weight_scale_inv scales a\.weight, which is missing": {"a.weight": None},
    r"scales a\.weight, which is BF16": {"a.weight": CODES.bfloat16()},
    r"a\.weight has two scales": {"a.weight_scale": torch.tensor(1.0)},
    r"scale_inv has shape \(2, 2\), need \(2, 3\)": {"a.weight_scale_inv": torch.ones(2, 2)},
    r"scale_inv has shape \(1, 1\), need": {"a.weight_scale_inv": torch.ones(1, 1)},
    r"scale_inv has shape \(6,\), need": {"a.weight_scale_inv": torch.ones(6)},
    r"scale_inv is I32, need one of F32": {"a.weight_scale_inv": torch.ones(2, 3).int()},
    r"a\.weight is FP8 of shape \(70,\), need matrices": {"a.weight": CODES[0].clone()},
    r"of shape \(1, 1, 40, 70\), need matrices": {"a.weight": CODES[None, None].clone()},
    r"of shape \(0, 70\), need matrices": {"a.weight": CODES[:0].clone()},
    r"b is F8_E5M2 without a scale": {"b": torch.ones(4, 4).to(torch.float8_e5m2)},
}  # fmt: skip
MXFP4_DAMAGE: dict[str, dict[str, Tensor | None]] = {
    r"a_blocks: its scale a_scales is missing": {"a_scales": None},
    r"a_scales scales a_blocks, which is missing": {"a_blocks": None},
    r"a_scales is U8 \(2, 8, 2\), need U8 \(2, 8, 3\)": {"a_scales": SCALES[..., :2].clone()},
    r"a_scales is F32": {"a_scales": SCALES.float()},
    r"a_blocks is U8 \(2, 8, 3, 8\), need U8 \[E": {"a_blocks": BLOCKS[..., :8].clone()},
    r"a_blocks is U8 \(8, 3, 16\), need U8 \[E": {"a_blocks": BLOCKS[0].clone()},
    r"a_blocks is I8": {"a_blocks": BLOCKS.to(torch.int8)},
    r"a is there twice, plain and packed": {"a": torch.ones(2, 96, 8)},
    r"b is F8_E4M3 without a scale": {"b": CODES},
}  # fmt: skip


@pytest.mark.parametrize("message", [*FP8_DAMAGE, *MXFP4_DAMAGE])
def test_packings_that_do_not_fit_together(message: str, open_weights: Unpack) -> None:
    is_fp8 = message in FP8_DAMAGE
    good: dict[str, Tensor | None] = (
        {"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 3)}
        if is_fp8
        else {"a_blocks": BLOCKS, "a_scales": SCALES}
    )
    quantization = FP8 if is_fp8 else MXFP4
    whole = {name: tensor for name, tensor in good.items() if tensor is not None}
    assert isinstance(open_weights(whole, quantization), Packed)
    damaged = good | (FP8_DAMAGE if is_fp8 else MXFP4_DAMAGE)[message]
    left = {name: tensor for name, tensor in damaged.items() if tensor is not None}
    with pytest.raises((ModelError, FormatError), match=rf"model\.safetensors: .*{message}"):
        open_weights(left, quantization)


def test_fp8_that_the_config_does_not_explain(open_weights: Unpack) -> None:
    with pytest.raises(ModelError, match=r"a is F8_E4M3 without a scale that quantization_config"):
        open_weights({"a": CODES}, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, open_weights: Unpack) -> None:
    scales = torch.ones(2, 3)
    scales[1, 2] = value
    weights = open_weights({"a": CODES, "a_scale_inv": scales}, FP8)
    for read in (lambda: weights.load("a"), lambda: list(weights.pieces("a"))):
        with pytest.raises(FormatError, match="a_scale_inv holds NaN or infinity"):
            read()


def test_codes_that_are_no_numbers(open_weights: Unpack) -> None:
    codes = torch.ones(3, 40, 70).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[1, 39, 69] = 0x7F
    weights = open_weights({"a": codes, "a_scale_inv": torch.ones(3, 2, 3)}, FP8)
    assert torch.equal(weights.load("a", 0), torch.ones(40, 70).bfloat16())
    with pytest.raises(ModelError, match=r"a, part 1: holds NaN or infinity"):
        weights.load("a", 1)
    with pytest.raises(ModelError, match=r"a, part 1: holds NaN or infinity"):
        list(weights.pieces("a"))


@pytest.mark.parametrize(
    ("exponent", "message"),
    [(255, "a_scales, part 1: exponent 255 is no number"), (254, "a_blocks, part 1: holds NaN")],
)
def test_exponents_that_are_no_numbers_or_too_large(
    exponent: int, message: str, open_weights: Unpack
) -> None:
    blocks, scales = BLOCKS.clone(), SCALES.clone()
    blocks[1, 7, 2, 15] = 0x70  # 6
    scales[1, 7, 2] = exponent
    weights = open_weights({"a_blocks": blocks, "a_scales": scales}, MXFP4)
    assert torch.equal(weights.load("a", 0), torch.zeros(96, 8).bfloat16())
    with pytest.raises((ModelError, FormatError), match=message):
        weights.load("a", 1)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_a_file_cut_short_while_we_read(
    name: str, models: Path, tmp_path: Path, open_weights: Unpack
) -> None:
    tensors = load_file(models / name / "model.safetensors")
    weights = open_weights(tensors, MXFP4 if name == "mxfp4" else FP8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:6000])
    for target in weights.packings:
        with pytest.raises(FormatError, match=r"model\.safetensors: ends at"):
            weights.load(target)
    assert weights.packings


def test_large_tensors_come_in_small_pieces(open_weights: Unpack) -> None:
    codes = torch.ones(3000, 2000).to(torch.float8_e4m3fn)
    weights = open_weights({"a": codes, "a_scale_inv": torch.ones(94, 63)}, FP8)
    sizes = [len(piece) for piece in weights.pieces("a")]
    assert sum(sizes) == 12_000_000
    assert max(sizes) <= 2 << 20
    blocks, scales = BLOCKS[:1].repeat(2, 200, 30, 1), SCALES[:1].repeat(2, 200, 30)
    flipped = open_weights({"a_blocks": blocks, "a_scales": scales}, MXFP4)
    sizes = [len(piece) for piece in flipped.pieces("a")]
    assert sum(sizes) == 2 * 1600 * 2880 * 2
    assert max(sizes) <= 8 << 20


@pytest.mark.parametrize("block", [[1, 1 << 20], [1 << 20, 1], [1 << 20, 1 << 20], [1, 1], [3, 70]])
@pytest.mark.usefixtures("small_bands")
def test_blocks_of_any_size(block: list[int], open_weights: Unpack) -> None:
    torch.manual_seed(2)
    codes, scales = to_fp8(torch.randn(2, 40, 70) * torch.logspace(-2, 2, 70), block)
    weights = open_weights({"a": codes, "a_scale_inv": scales}, FP8 | {"weight_block_size": block})
    want = (codes.float() * spread(scales, block, 40, 70)).bfloat16()
    assert torch.equal(weights.load("a"), want)


def test_a_block_larger_than_its_matrix_is_not_spread_out(
    open_weights: Unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.ones(64, 70).to(torch.float8_e4m3fn)
    weights = open_weights(
        {"a": codes, "a_scale_inv": torch.ones(64, 1)}, FP8 | {"weight_block_size": [1, 1 << 20]}
    )
    spread_to: list[int] = []
    real = Tensor.repeat_interleave

    def spy(scales: Tensor, times: int, dim: int) -> Tensor:
        spread_to.append(scales.shape[0] * scales.shape[1] * times)
        assert spread_to[-1] <= 64 * 70 * 2
        return real(scales, times, dim)

    monkeypatch.setattr(Tensor, "repeat_interleave", spy)
    assert torch.equal(weights.load("a"), torch.ones(64, 70).bfloat16())
    assert spread_to


class _CountedName(str):
    """A tensor name that counts how often any is compared with another."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        _CountedName.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("kind", ["FP8", "MXFP4"])
def test_pairing_scales_takes_time_in_proportion(kind: str, tmp_path: Path) -> None:
    pair: dict[str, tuple[str, tuple[int, ...]]]
    if kind == "FP8":
        pair = {"": ("F8_E4M3", (2, 2)), "_scale_inv": ("F32", (1, 1))}
    else:
        pair = {"_blocks": ("U8", (2, 8, 3, 16)), "_scales": ("U8", (2, 8, 3))}
    tensors = {
        (name := _CountedName(f"{i}{end}")): SourceTensor(name, *what)
        for i in range(25_000)
        for end, what in pair.items()
    }
    _CountedName.compared = 0
    shards = cast("Shards", SimpleNamespace(tensors=tensors, where=lambda name: tmp_path))
    found = _find_fp8(shards, [128, 128]) if kind == "FP8" else _find_mxfp4(shards)
    assert len(found) == 25_000
    assert 0 < _CountedName.compared < 20 * len(tensors)
