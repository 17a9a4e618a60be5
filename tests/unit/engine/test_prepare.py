"""From a name to a store, made once and made anew when its checkpoint changes."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from fate_moe.engine.prepare import cached_store, convert_model, find_checkpoint, find_store
from fate_moe.errors import ConfigError, ModelError, StoreError
from fate_moe.models import checkpoint as models_checkpoint
from fate_moe.store.format import read_manifest
from fate_moe.store.header import read_header
from tests import tiny


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def test_a_changed_checkpoint_is_converted_again(checkpoint: Path, tmp_path: Path) -> None:
    first = find_store(str(checkpoint), cache_dir=tmp_path / "cache")
    before = read_manifest(first)
    assert read_manifest(find_store(str(checkpoint), cache_dir=tmp_path / "cache")) == before

    shard = checkpoint / "model.safetensors"
    weights = load_file(shard)  # the same names, shapes and size, other values
    save_file({k: v + 0.25 for k, v in weights.items()}, shard, metadata={"format": "pt"})
    second = find_store(str(checkpoint), cache_dir=tmp_path / "cache")
    assert second == first
    assert read_manifest(second).layers[0].checksums != before.layers[0].checksums


def test_the_manifest_names_the_model(checkpoint: Path, tmp_path: Path) -> None:
    _, manifest = convert_model(str(checkpoint), tmp_path / "out", cache_dir=tmp_path)
    assert manifest.source.id == str(checkpoint)
    assert set(manifest.source.files) >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_two_folders_of_one_name_have_two_stores(tmp_path: Path) -> None:
    places = set()
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        places.add(cached_store(str(folder), tmp_path))
    assert len(places) == 2


def test_two_ids_have_two_stores(tmp_path: Path) -> None:
    names = ["a/b-c", "a-b/c", "a/b--c", "a--b/c", "a/b", "a/b.", "a/b-"]
    names += [f"owner/{letter}{'x' * 90}" for letter in "pq"]
    places = {cached_store(name, tmp_path) for name in names}
    assert len(places) == len(names)
    revisions = [None, "main", "refs/pr/1", "refs--pr/1", "8bit", "4bit-minmax"]
    places = {cached_store("a/b", tmp_path, revision) for revision in revisions}
    places |= {cached_store("a/b", tmp_path, bits=8), cached_store("a/b", tmp_path, fitted=False)}
    assert len(places) == len(revisions) + 2


@pytest.mark.parametrize(
    ("model", "revision", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", None, "Qwen--Qwen3-30B-A3B"),
        ("owner/model_1.5", "v1", "owner--model_1.5@v1"),
        ("owner/model", "refs/pr/1", "owner--model@refs--pr--1"),
        ("smolmoe", None, "smolmoe"),
    ],
)
def test_ordinary_ids_keep_their_names(
    model: str, revision: str | None, name: str, tmp_path: Path
) -> None:
    assert cached_store(model, tmp_path, revision).name == name


CHOICES = [(4, True), (4, False), (8, True), (8, False), (16, True)]


def test_stores_of_other_settings_have_other_places(tmp_path: Path) -> None:
    def place(bits: int, fitted: bool, model: str = "smolmoe") -> str:
        return cached_store(model, tmp_path, bits=bits, fitted=fitted).name

    assert [place(*choice) for choice in CHOICES] == [
        "smolmoe", "smolmoe@4bit-minmax", "smolmoe@8bit", "smolmoe@8bit-minmax", "smolmoe@16bit",
    ]  # fmt: skip
    assert place(4, True) == cached_store("smolmoe", tmp_path).name
    for model in ("x" * 500, str(tmp_path)):  # a name cut short, a name with a hash
        assert len({place(*choice, model) for choice in CHOICES}) == len(CHOICES)


def test_stores_with_other_residents_have_other_places(tmp_path: Path) -> None:
    def place(bits: int, fitted: bool, resident: int) -> str:
        return cached_store("a/b", tmp_path, bits=bits, fitted=fitted, resident=resident).name

    assert place(4, True, 16) == "a--b"
    assert place(4, True, 4) == "a--b@4bit-resident4"
    assert place(8, False, 8) == "a--b@8bit-minmax-resident8"
    assert cached_store("a/b", tmp_path, "4bit-resident4").name != place(4, True, 4)
    with pytest.raises(ConfigError, match="resident: 5 is none of 4, 8, 16"):
        place(4, True, 5)


def test_a_store_must_have_the_residents_that_were_asked_for(tmp_path: Path) -> None:
    checkpoint = tiny.save_checkpoint(tmp_path / "checkpoint", vocab_size=1024)  # 2**16 weights
    cache = tmp_path / "cache"
    plain, small = (
        find_store(str(checkpoint), cache_dir=cache, resident=resident) for resident in (None, 8)
    )
    assert "resident_bits" not in read_manifest(plain).quantization
    assert read_manifest(small).quantization["resident_bits"] == 8
    names = read_header(small / "resident.safetensors").tensors
    assert sum(name.endswith(".record") for name in names) == 2
    for store, asked in ((plain, 16), (small, 8)):
        assert find_store(str(store), cache_dir=cache) == store
        assert find_store(str(store), cache_dir=cache, resident=asked) == store
    with pytest.raises(ModelError, match="holds 8 bits of what is no expert, need 4"):
        find_store(str(small), cache_dir=cache, resident=4)
    with pytest.raises(StoreError, match="other content or options"):
        convert_model(str(checkpoint), small, cache_dir=cache, resident=4)


def test_settings_are_kept_apart_in_the_cache_folder(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = [
        find_store(str(checkpoint), cache_dir=cache, bits=bits, fitted=fitted)
        for bits, fitted in CHOICES
    ]
    assert len(set(found)) == len(CHOICES)
    assert find_store(str(checkpoint), cache_dir=cache) == found[0]
    assert [read_manifest(store).quantization for store in found] == [
        {"bits": 4, "group": 64, "balanced": True},
        {"bits": 4, "group": 64, "scales": "minmax"},
        {"bits": 8, "group": 64, "balanced": True},
        {"bits": 8, "group": 64, "scales": "minmax"},
        {"bits": 32},  # the checkpoint is in float32
    ]


def test_a_store_must_hold_what_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    for bits, fitted in CHOICES:
        out = tmp_path / f"store-{bits}-{fitted}"
        convert_model(str(checkpoint), out, cache_dir=tmp_path, bits=bits, fitted=fitted)
        assert find_store(str(out), cache_dir=tmp_path) == out  # nothing asked for: as it is
        for asked in CHOICES:
            if asked == (bits, fitted):
                assert find_store(str(out), cache_dir=tmp_path, bits=bits, fitted=fitted) == out
                continue
            with pytest.raises(ModelError, match=rf"{out.name}: the store holds {bits}bit") as no:
                find_store(str(out), cache_dir=tmp_path, bits=asked[0], fitted=asked[1])
            assert f"need {asked[0]}bit" in str(no.value)
            assert str(checkpoint) in str(no.value)


def test_settings_that_do_not_exist_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    for bits in (0, 2, 5, 32):
        with pytest.raises(ConfigError, match=f"bits: {bits} is none of 4, 8, 16"):
            convert_model("no/such-model", None, cache_dir=tmp_path, bits=bits)
    with pytest.raises(ConfigError, match="scales: minmax needs 4 or 8 bits, have 16"):
        find_store("no/such-model", cache_dir=tmp_path, bits=16, fitted=False)


def test_names_cannot_leave_the_cache_folder(tmp_path: Path) -> None:
    for name in ("../../etc/passwd", "..", "a/../../b", "/etc", "x" * 500, "\0"):
        place = cached_store(name, tmp_path)
        assert place.parent == tmp_path / "stores"
        assert os.sep not in place.name


def test_what_is_not_ours_stays(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("store.old", "store.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"store\.partial: is in the way and not ours"):
        convert_model(str(checkpoint), tmp_path / "store", cache_dir=tmp_path)
    (tmp_path / "store.partial" / "thesis.txt").rename(tmp_path / "thesis.txt")
    for _ in range(2):
        convert_model(str(checkpoint), tmp_path / "store", cache_dir=tmp_path, force=True)
    assert (tmp_path / "store.old" / "thesis.txt").read_text() == "years of work"
    left = {p.name for p in tmp_path.iterdir()} - {"model", "store", "store.old", "thesis.txt"}
    assert left <= {".store.lock"}


def test_a_finished_store_needs_neither_lock_nor_right_to_write(
    checkpoint: Path, tmp_path: Path
) -> None:
    store = find_store(str(checkpoint), cache_dir=tmp_path / "cache")
    lock = FileLock(store.with_name(f".{store.name}.lock"))
    with lock:
        assert find_store(str(checkpoint), cache_dir=tmp_path / "cache") == store


def test_a_changed_chat_template_is_a_changed_model(checkpoint: Path, tmp_path: Path) -> None:
    store = find_store(str(checkpoint), cache_dir=tmp_path / "cache")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert find_store(str(checkpoint), cache_dir=tmp_path / "cache") == store
    assert (store / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_the_store_is_the_same_for_any_number_of_jobs(checkpoint: Path, tmp_path: Path) -> None:
    stores = []
    for jobs in (1, 3, None):
        out = tmp_path / f"store-{jobs}"
        convert_model(str(checkpoint), out, cache_dir=tmp_path, jobs=jobs)
        stores.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert stores[0] == stores[1] == stores[2]


def test_torch_computes_one_expert_in_one_thread(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    real = models_checkpoint.encode

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        here = threading.current_thread() is threading.main_thread()
        seen.append((torch.get_num_threads(), here))
        return real(*args, **kwargs)

    monkeypatch.setattr(models_checkpoint, "encode", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        convert_model(str(checkpoint), tmp_path / "out", cache_dir=tmp_path, jobs=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(1, False)}


def test_a_number_of_jobs_that_cannot_be_costs_no_download(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs: have 0, need 1 to 256"):
        convert_model("no/such-model", None, cache_dir=tmp_path, jobs=0)


@pytest.mark.parametrize("name", ["../x", "a b/c", "one/two/three", "~nobody/x/y", "http://x/y"])
def test_what_is_no_name_of_a_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        find_checkpoint(name, cache_dir=tmp_path)
