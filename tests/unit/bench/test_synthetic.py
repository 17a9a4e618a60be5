"""Made-up models: stores and GGUFs of a shape hold the same weights, and open."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fate_moe.bench.shapes import SHAPES, Shape, find_shape
from fate_moe.bench.synthetic import (
    Pool,
    SyntheticSource,
    plain_values,
    resident_shapes,
    run,
    write_store,
)
from fate_moe.bench.synthetic_gguf import write_gguf
from fate_moe.config import make_config
from fate_moe.engine.build import build
from fate_moe.errors import ConfigError, StoreError
from fate_moe.models.gguf import GgufWeights, open_gguf
from fate_moe.models.gguf_names import read_names
from fate_moe.quant.codec import decode
from fate_moe.quant.record import MatrixSpec, RecordLayout
from fate_moe.store.format import read_manifest
from fate_moe.store.header import read_header
from fate_moe.store.verify import verify

TINY = find_shape("tiny")
# One of each family, as small as its rules allow.
SMALL = {
    "qwen2_moe": TINY,
    "qwen3_moe": Shape("small", "qwen3_moe", {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64,
        "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "vocab_size": 1024, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }),
    "olmoe": Shape("small", "olmoe", {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 96, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 1024, "max_position_embeddings": 256,
        "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
    "gpt_oss": Shape("small", "gpt_oss", {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 1024,
        "sliding_window": 128, "max_position_embeddings": 131072,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module", params=SMALL)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[Shape, Path, Path]:
    """A shape, its store and its GGUF."""
    shape = SMALL[request.param]
    store, gguf = folder / f"{request.param}-store", folder / f"{request.param}.gguf"
    write_store(shape, store, resident_bits=4)
    write_gguf(shape, gguf)
    return shape, store, gguf


def record_bytes(path: Path, offset: int, count: int) -> torch.Tensor:
    data = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    return torch.from_numpy(data)


def test_experts_of_store_and_gguf_are_equal(pair: tuple[Shape, Path, Path]) -> None:
    shape, store, path = pair
    manifest, gguf = read_manifest(store), open_gguf(path)
    source = SyntheticSource(shape)
    weights = GgufWeights(gguf, read_names(gguf, source.skeleton))
    compared = 0
    for entry in manifest.layers:
        layout = RecordLayout.from_json(entry.layout)
        for expert in (0, entry.num_experts - 1):
            raw = record_bytes(store / entry.file, entry.offset(expert), entry.record_bytes)
            for name, mine in decode(layout, raw, torch.float32).items():
                theirs = weights.load(f"{entry.path}.{name}", expert)
                theirs = theirs.mT if entry.transposed and theirs.dim() == 2 else theirs
                assert torch.equal(mine, theirs), (entry.path, name)
                compared += mine.numel()
    assert compared > 50_000
    weights.close()
    source.close()


def test_everything_else_of_store_and_gguf_is_equal(pair: tuple[Shape, Path, Path]) -> None:
    shape, store, path = pair
    gguf, source = open_gguf(path), SyntheticSource(shape)
    weights = GgufWeights(gguf, read_names(gguf, source.skeleton))
    header = read_header(store / "resident.safetensors")
    kinds: Counter[str] = Counter()
    for name in resident_shapes(source.skeleton, source.expert_layers):
        theirs = weights.load(name)
        record = header.tensors.get(f"{name.removesuffix('.weight')}.record")
        entry = record or header.tensors[name]
        raw = record_bytes(store / "resident.safetensors", entry.offset, entry.nbytes)
        if record is None:
            mine = raw.view(torch.float32).view(theirs.shape)
        else:
            spec = MatrixSpec("weight", *theirs.shape, 64 if theirs.shape[1] % 64 == 0 else 32)
            mine = decode(RecordLayout((spec,)), raw, torch.float32)["weight"]
        assert torch.equal(mine, theirs), name
        kinds["plain" if record is None else "record"] += 1
    assert kinds["record"] >= 2, "embedding and head"
    assert kinds["plain"] >= 5
    weights.close()
    source.close()


def test_weights_are_of_the_right_size_and_differ(pair: tuple[Shape, Path, Path]) -> None:
    _, store, _ = pair
    entry = read_manifest(store).layers[0]
    layout = RecordLayout.from_json(entry.layout)
    found = [
        decode(layout, record_bytes(store / entry.file, entry.offset(e), entry.record_bytes),
               torch.float32)[layout.matrices[0].name]
        for e in (0, 1)
    ]  # fmt: skip
    assert not torch.equal(*found)
    assert 0.017 < found[0].std() < 0.023  # gate and up; what a layer adds is smaller
    assert abs(found[0].mean()) < 0.002


def test_gains_are_in_the_scales_alone() -> None:
    plain, large = Pool(64), Pool(64, "embed_tokens")
    assert large.scale.mean() == pytest.approx(32 * plain.scale.mean(), rel=0.01)
    assert large.codes.mean() == pytest.approx(plain.codes.mean(), abs=0.01)
    assert not np.array_equal(plain.codes, large.codes)


def test_a_store_is_intact(pair: tuple[Shape, Path, Path]) -> None:
    assert verify(pair[1]).is_intact


def test_resident_bits_of_eight_are_the_same_values(folder: Path) -> None:
    stores = {bits: folder / f"tiny-{bits}" for bits in (4, 8)}
    found = []
    for bits, store in stores.items():
        manifest = write_store(TINY, store, resident_bits=bits)
        assert manifest.quantization["resident_bits"] == bits
        entry = read_header(store / "resident.safetensors").tensors["lm_head.record"]
        layout = RecordLayout((MatrixSpec("weight", 2048, 64, 64),), bits=bits)
        assert entry.nbytes == layout.record_bytes
        raw = record_bytes(store / "resident.safetensors", entry.offset, entry.nbytes)
        found.append(decode(layout, raw, torch.float32)["weight"])
    assert torch.equal(*found)


def test_a_deep_model_routes_nearly_evenly_in_every_layer(folder: Path) -> None:
    numbers = {
        **TINY.numbers, "hidden_size": 128, "num_hidden_layers": 16, "vocab_size": 8192,
        "shared_expert_intermediate_size": 352,
    }  # fmt: skip
    write_store(Shape("deep", "qwen2_moe", numbers), folder / "deep", resident_bits=16)
    engine = build(folder / "deep", make_config("resident"))
    used: list[Counter[int]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        used.append(Counter(output[2].flatten().tolist()))

    try:
        for layer in engine.model.model.layers:
            layer.mlp.gate.register_forward_hook(note)
        ids = torch.randint(8192, (1, 512), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = engine.model(input_ids=ids, logits_to_keep=1).logits
    finally:
        engine.close()
    assert torch.isfinite(logits).all()
    even = 512 * 3 / 16
    assert [len(counts) for counts in used] == [16] * 16
    assert max(max(counts.values()) for counts in used) < 1.8 * even
    assert min(min(counts.values()) for counts in used) > even / 2.5


def test_a_run_goes_around_the_end() -> None:
    groups = np.arange(10, dtype=np.uint8).reshape(5, 2)
    assert run(groups, 3, 4).tolist() == [6, 7, 8, 9, 0, 1, 2, 3]
    assert run(groups, 4, 7).tolist() == [8, 9, *range(10), 0, 1]


def test_codes_are_balanced_around_the_zero() -> None:
    codes = Pool(64).codes
    assert (codes.min(), codes.max()) == (1, 15)
    assert abs(codes.mean() - 8) < 0.01


def test_a_file_that_is_there_is_kept(folder: Path) -> None:
    path = folder / "own.gguf"
    path.write_bytes(b"mine")
    write_gguf(TINY, path)
    assert path.read_bytes() == b"mine"


def test_another_store_is_not_overwritten(folder: Path) -> None:
    write_store(TINY, folder / "other", resident_bits=16)
    with pytest.raises(StoreError, match="other content or options"):
        write_store(TINY, folder / "other", resident_bits=4)


def test_plain_values_depend_on_the_name_alone() -> None:
    one, other = (plain_values(f"layers.{i}.mlp.gate.weight", (8, 16)) for i in (0, 1))
    assert np.array_equal(one, plain_values("layers.0.mlp.gate.weight", (8, 16)))
    assert not np.array_equal(one, other)
    assert plain_values("model.norm.weight", (3,)).tolist() == [1, 1, 1]
    assert plain_values("q_proj.bias", (2,)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "layers", "experts", "total_b"),
    [
        ("qwen1.5-moe-a2.7b", 24, 60, 14.3),
        ("qwen3-30b-a3b", 48, 128, 30.5),
        ("olmoe-1b-7b", 16, 64, 6.9),
        ("gpt-oss-20b", 24, 32, 20.9),
    ],
)
def test_shapes_have_the_published_number_of_weights(
    name: str, layers: int, experts: int, total_b: float
) -> None:
    source = SyntheticSource(find_shape(name))
    total = sum(parameter.numel() for parameter in source.skeleton.parameters())
    assert total / 1e9 == pytest.approx(total_b, rel=0.01)
    assert [layer.num_experts for layer in source.layers] == [experts] * layers
    source.close()


def test_an_unknown_shape_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"shape: 'x' is none of .*tiny"):
        find_shape("x")
    assert "tiny" in SHAPES
