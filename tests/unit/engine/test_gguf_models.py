"""Can a GGUF be named wherever a model can: file, folder, Python, command line?"""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fate_moe
from fate_moe.cli import app, generate, stores  # noqa: F401
from fate_moe.engine.prepare import cached_store, convert_model, find_checkpoint, find_store
from fate_moe.errors import ModelError
from fate_moe.store.format import read_manifest
from tests.unit.models.gguf_files import Type, make_model, write_gguf


def kinds(name: str) -> Type:
    return Type.Q4_0 if "up_exps" in name or "gate_exps" in name else Type.Q8_0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q4_0.gguf"
    write_gguf(path, "qwen2_moe", make_model("qwen2_moe"), kinds)
    return path


def test_a_file_is_converted_once(model: Path, tmp_path: Path) -> None:
    store = find_store(str(model), cache_dir=tmp_path)
    assert store == cached_store(str(model), tmp_path)
    manifest = read_manifest(store)
    assert manifest.source.id == str(model)
    assert set(manifest.source.files) == {"config.json", "tiny-Q4_0.gguf"}
    assert manifest.quantization["source"] == {"Q4_0": "kept", "Q8_0": "requantized"}
    written = (store / "fate.json").stat().st_mtime_ns
    assert find_store(str(model), cache_dir=tmp_path) == store
    assert (store / "fate.json").stat().st_mtime_ns == written
    write_gguf(model, "qwen2_moe", make_model("qwen2_moe"), lambda name: Type.Q5_1)
    assert find_store(str(model), cache_dir=tmp_path) == store
    assert read_manifest(store).quantization["source"] == {"Q5_1": "requantized"}
    write_gguf(model, "qwen2_moe", make_model("qwen2_moe"), kinds)


def test_two_files_of_one_folder_have_two_stores(model: Path, tmp_path: Path) -> None:
    other = tmp_path / model.name
    other.write_bytes(model.read_bytes())
    assert cached_store(str(other), tmp_path) != cached_store(str(model), tmp_path)


def test_a_folder_of_one_gguf_is_that_model(model: Path, tmp_path: Path) -> None:
    assert find_checkpoint(str(model.parent), cache_dir=tmp_path) == model
    (tmp_path / "a.gguf").write_bytes(model.read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    for number in (1, 2):
        (tmp_path / f"b-0000{number}-of-00002.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 GGUF models, name one of a.gguf, b-00001-of-00002"):
        find_checkpoint(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "a.gguf").unlink()
    found = find_checkpoint(str(tmp_path), cache_dir=tmp_path)
    assert found.name == "b-00001-of-00002.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path), cache_dir=tmp_path) == tmp_path


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="models/x.gguf: no such file"):
        find_store("models/x.gguf", cache_dir=tmp_path)


def test_python_loads_and_generates(model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = fate_moe.load(str(model), experts="75%", cache_dir=tmp_path)
    try:
        ids = tokenizer("Fate", return_tensors="pt")["input_ids"]
        out = loaded.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert out.shape == (1, ids.shape[1] + 4)
        assert loaded.dtype == torch.float32
    finally:
        loaded.fate.close()


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "store"
    done = run.invoke(app, ["convert", str(model), str(out), "--cache-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Q4_0 kept, Q8_0 requantized" in done.output
    done = run.invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(done.stdout)["quantization"]["source"]["Q4_0"] == "kept"
    done = run.invoke(app, ["generate", str(out), "-p", "Hi", "-n", "3"])
    assert done.exit_code == 0, done.output


def test_bits_choose_what_is_kept(model: Path, tmp_path: Path) -> None:
    want = {
        4: {"bits": 4, "group": 64, "source": {"Q4_0": "kept", "Q8_0": "requantized"}},
        8: {"bits": 8, "group": 64, "source": {"Q4_0": "kept", "Q8_0": "kept"}},
        16: {"bits": 32, "source": {"Q4_0": "dequantized", "Q8_0": "dequantized"}},
    }
    for bits, expected in want.items():
        _, manifest = convert_model(str(model), tmp_path / str(bits), cache_dir=tmp_path, bits=bits)
        assert manifest.quantization == expected
