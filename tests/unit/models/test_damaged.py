"""Whatever is wrong with a checkpoint, plain or packed: does one line name the culprit?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe.errors import FateError, FormatError, ModelError
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.packed import unpack
from fate_moe.models.shards import INDEX_FILE, SINGLE_FILE, Shards
from fate_moe.store.convert import convert
from fate_moe.types import ExpertKey
from tests.unit.models.packing import pack_fp8, pack_mxfp4
from tests.unit.models.test_checkpoint import save, shard

KINDS = ("plain", "fp8", "mxfp4")
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each kind, in one file each."""
    root = tmp_path_factory.mktemp("good")
    save("deepseek_v3", root / "plain", kv_lora_rank=24, v_head_dim=16)
    save("gpt_oss", root / "gpt")
    pack_fp8(root / "plain", root / "fp8")
    pack_mxfp4(root / "gpt", root / "mxfp4")
    return root


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, good: Path, tmp_path: Path) -> Path:
    """A copy in three shards."""
    copy = shutil.copytree(good / request.param, tmp_path / "model")
    shard(copy)
    return copy


def refusal(folder: Path) -> str:
    """Open and convert; return the one line that it ends with."""
    with pytest.raises((ModelError, FormatError)) as caught, open_checkpoint(folder) as source:
        convert(source, folder.parent / "store")
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "store").exists()
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change a header as JSON and keep the data as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def an_expert(path: Path) -> str:
    """Name a tensor of routed experts that lies in a shard; packed ones first."""
    names = [name for name in load_file(path) if ".experts." in name and "bias" not in name]
    return min(names, key=lambda name: (not name.endswith(("_blocks", "_inv")), name))


def test_the_good_ones_are_good(folder: Path) -> None:
    with open_checkpoint(folder) as source:
        assert convert(source, folder.parent / "store").layers


@pytest.mark.parametrize("size", [0, 5, 100, -1, -4000])
def test_a_shard_cut_short(folder: Path, size: int) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:size])
    error = refusal(folder)
    assert SECOND in error
    assert "is the download complete?" in error


def test_a_shard_that_is_not_there(folder: Path) -> None:
    (folder / SECOND).unlink()
    assert f"{SECOND}: shard is missing" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_of_a_hostile_size(folder: Path, length: int) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(length.to_bytes(8, "little") + data[8:])
    assert f"{SECOND}: header length {length} does not fit" in refusal(folder)


def test_ranges_that_overlap(folder: Path) -> None:
    names: list[str] = []

    def overlap(header: dict[str, dict[str, object]]) -> None:
        same = [n for n in header if n != "__metadata__"]
        by_size: dict[str, str] = {}
        for name in same:
            key = json.dumps([header[name]["dtype"], header[name]["shape"]])
            if key in by_size:
                header[name]["data_offsets"] = header[by_size[key]]["data_offsets"]
                names.extend((name, by_size[key]))
                return
            by_size[key] = name

    edit_header(folder / SECOND, overlap)
    error = refusal(folder)
    assert SECOND in error
    assert "overlaps the one before" in error
    assert any(name in error for name in names)


def test_a_tensor_in_another_shard_than_the_index_says(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    name = next(n for n, file in index["weight_map"].items() if file == SECOND)
    index["weight_map"][name] = SECOND.replace("00002-", "00001-")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert f"tensor {name!r} of the index is missing" in refusal(folder)


@pytest.mark.parametrize(
    "file", ["other.safetensors", "../model.safetensors", "/etc/passwd", "model.bin", "", 7, None]
)
def test_an_index_that_leads_astray(folder: Path, file: object) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    error = refusal(folder)
    assert (
        "other.safetensors: shard is missing" if file == "other.safetensors" else repr(file)
    ) in error


def test_a_name_that_two_shards_have(folder: Path) -> None:
    name = an_expert(folder / SECOND)
    value = load_file(folder / SECOND)[name]
    edit(folder / SECOND.replace("00002-", "00003-"), lambda t: t.update({name: value}))
    assert f"tensor {name!r} is also in another shard" in refusal(folder)


def test_a_name_that_one_shard_has_twice(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    name = an_expert(folder / SECOND)
    text = text[:-1] + f",{json.dumps(name)}:{{}}}}".encode()
    (folder / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    error = refusal(folder)
    assert SECOND in error
    assert "a key appears twice" in error


@pytest.mark.parametrize("name", ["a\nb", "x" * 2000, "\x1b[2J", ""])
def test_names_that_no_message_could_carry(name: str, folder: Path) -> None:
    edit(folder / SECOND, lambda tensors: tensors.update({name: torch.ones(1)}))
    error = refusal(folder)
    assert f"{SECOND}: tensor {name[:80]!r}" in error
    assert error.isprintable()


def test_an_expert_that_is_not_there(folder: Path) -> None:
    name = an_expert(folder / SECOND)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    edit(folder / SECOND, change)
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    error = refusal(folder)
    stem = name.removesuffix("_blocks").removesuffix("_scale_inv")
    assert stem in error or ("experts." in error and "tensors are missing" in error)
    assert "missing" in error


def test_weights_that_are_no_numbers(folder: Path) -> None:
    names = {name: path for path in folder.glob("*.safetensors") for name in load_file(path)}
    name = next(
        n
        for n in names
        if ".experts." in n and n.endswith(("down_proj.weight", "down_proj_scales"))
    )

    def change(tensors: dict[str, Tensor]) -> None:
        nan = {torch.uint8: 255, torch.float8_e4m3fn: 0x7F}.get(tensors[name].dtype)
        flat = tensors[name].view(-1)
        if nan is None:
            flat[3] = float("nan")
        else:
            flat.view(torch.uint8)[3] = nan

    edit(names[name], change)
    error = refusal(folder)
    assert "NaN" in error or "is no number" in error
    assert "experts" in error


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder whose one file holds plain, FP8 and MXFP4 tensors, 1 KiB or so."""
    codes = torch.ones(8, 8).to(torch.float8_e4m3fn)
    tensors = {
        "plain": torch.ones(4, 8, dtype=torch.bfloat16),
        "a.weight": codes, "a.weight_scale_inv": torch.ones(2, 2),
        "e_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
        "e_scales": torch.full((2, 4, 1), 127, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    return tmp_path


FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
WORDS = st.sampled_from(
    [b"F8_E4M3", b"BF16", b"F32", b"U8", b"[4,4]", b"[]", b"0", b"-1", b"99999999999", b"1e9", b'"',
     b"}", b"{", b"[", b"_scale_inv", b"_blocks", b"_scales", b"a.weight", b"\xff", b"\x00"]
)  # fmt: skip


def read_all(folder: Path, quantization: object) -> int:
    """Read every tensor in every way; return the bytes."""
    weights = unpack(Shards(folder), folder, quantization)
    try:
        total = 0
        for name, tensor in weights.tensors.items():
            total += sum(len(piece) for piece in weights.pieces(name))
            if tensor.dtype in ("BF16", "F16", "F32"):
                weights.load(name)
                for part in range(tensor.shape[0] if tensor.shape else 0):
                    weights.load(name, part)
        return total
    finally:
        weights.close()


@settings(
    max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 12), WORDS | st.binary(max_size=4)),
        min_size=1, max_size=4,
    ),
    keep_length=st.booleans(),
    quantization=st.sampled_from([None, FP8, {"quant_method": "mxfp4"}]),
)  # fmt: skip
def test_a_header_with_random_mutations_is_read_or_refused(
    small: Path, edits: list[tuple[float, int, bytes]], keep_length: bool, quantization: object
) -> None:
    original = (small / SINGLE_FILE).read_bytes()
    length = int.from_bytes(original[:8], "little")
    text = original[8 : 8 + length]
    for where, gone, new in edits:
        at = int(where * len(text))
        text = text[:at] + new + text[at + gone :]
    size = length if keep_length else len(text)
    folder = small / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE_FILE).write_bytes(size.to_bytes(8, "little") + text + original[8 + length :])
    try:
        total = read_all(folder, quantization)
    except FateError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
    else:
        assert total <= 4 * len(original)  # four bits become sixteen, and nothing else grows


def test_the_unchanged_file_is_read(small: Path) -> None:
    def drop(*gone: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: [tensors.pop(name) for name in gone] and None

    edit(small / SINGLE_FILE, drop("e_blocks", "e_scales"))
    assert read_all(small, FP8) == 64 + 128


def test_a_record_of_a_good_layer_is_no_help_to_a_bad_one(good: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(good / "fp8", tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 0] = float("inf")

    edit(copy / SINGLE_FILE, change)
    with open_checkpoint(copy) as source:
        assert source.record(ExpertKey(0, 2))
        with pytest.raises(
            FormatError, match=r"experts\.3\.up_proj\.weight_scale_inv holds NaN or"
        ):
            source.record(ExpertKey(0, 3))
