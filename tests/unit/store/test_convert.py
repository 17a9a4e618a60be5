"""Is a store written whole or not at all, resumed without double work, and never over another?"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import safe_open

from fate_moe.errors import ModelError, StoreError
from fate_moe.store import convert as convert_module
from fate_moe.store import workdir
from fate_moe.store.convert import convert
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from fate_moe.store.workdir import Workdir
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource, formula

ALL = [ExpertKey(layer, expert) for layer in range(2) for expert in range(3)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_store_holds_every_record_where_the_manifest_says(
    source: FormulaSource, out: Path
) -> None:
    manifest = convert(source, out)
    assert read_manifest(out) == manifest
    assert sorted(source.encoded) == ALL
    for index, layer in enumerate(manifest.layers):
        data = (out / layer.file).read_bytes()
        assert len(data) == layer.file_bytes
        for expert in range(layer.num_experts):
            start = layer.offset(expert)
            assert start % 4096 == 0
            record = data[start : start + layer.record_bytes]
            assert record == formula(ExpertKey(index, expert), layer.record_bytes)
    assert names(out) == {
        "fate.json", "config.json", "resident.safetensors", "model.safetensors.index.json",
        "experts-00000.safetensors", "experts-00001.safetensors",
    }  # fmt: skip
    assert not out.with_name("store.partial").exists()


def test_any_safetensors_tool_reads_the_files(source: FormulaSource, out: Path) -> None:
    convert(source, out)
    with safe_open(out / "experts-00001.safetensors", "np") as file:
        assert file.get_tensor("experts.2").tobytes() == formula(ExpertKey(1, 2), 8192)
    with safe_open(out / "resident.safetensors", "pt") as file:
        assert set(file.keys()) == {"norm.weight", "embed.weight"}
        assert tuple(file.get_tensor("embed.weight").shape) == (5, 7)
        assert file.get_tensor("norm.weight").numpy().tobytes() == b"".join(
            source.read_resident("norm.weight")
        )
        assert file.metadata() == {"format": "pt"}


def test_the_index_leads_transformers_to_the_resident_file(
    source: FormulaSource, out: Path
) -> None:
    convert(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 82
    assert index["weight_map"] == dict.fromkeys(
        ["norm.weight", "embed.weight"], "resident.safetensors"
    )


def test_small_files_come_along_and_code_does_not(source: FormulaSource, out: Path) -> None:
    wanted = ["generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
              "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"]  # fmt: skip
    unwanted = ["modeling_x.py", "pytorch_model.bin", "model.pt", "x.safetensors", "fate.json.py",
                "model.safetensors.index.json.bak", "training_args.bin", "a.pkl"]  # fmt: skip
    (source.folder / "additional_chat_templates").mkdir()
    for name in wanted + unwanted:
        (source.folder / name).write_text(name)
    convert(source, out)
    for name in wanted:
        assert (out / name).read_text() == name
    assert not {name for name in unwanted if (out / name).exists()}


def test_progress_counts_every_byte(source: FormulaSource, out: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    manifest = convert(source, out, progress=lambda *step: seen.append(step))
    experts = sum(layer.file_bytes for layer in manifest.layers)
    for what, total in (
        ("converting experts", experts),
        ("copying the rest", manifest.resident.bytes),
    ):
        own = [(done, of) for name, done, of in seen if name == what]
        assert own[-1] == (total, total)
        assert own == sorted(own)


def test_the_same_source_again_returns_at_once(source: FormulaSource, out: Path) -> None:
    manifest = convert(source, out)
    source.encoded.clear()
    assert convert(source, out) == manifest
    assert source.encoded == []


@pytest.mark.parametrize("change", ["content", "options"])
def test_another_store_is_only_replaced_by_force(
    source: FormulaSource, out: Path, change: str
) -> None:
    convert(source, out)
    if change == "content":
        source.source.files["config.json"] = "9" * 32  # type: ignore[index]
    else:
        source.quantization = {"bits": 4, "group": 32}
    with pytest.raises(StoreError, match=r"use --force to replace it \(force=True in Python\)"):
        convert(source, out)
    manifest = convert(source, out, force=True)
    assert read_manifest(out) == manifest
    assert manifest.quantization == source.quantization
    assert names(out.parent) <= {"store", ".store.lock"}


def test_force_keeps_the_old_store_until_the_new_one_is_whole(
    source: FormulaSource, out: Path
) -> None:
    old = convert(source, out)
    source.quantization = {"bits": 4, "group": 32}
    source.fail_at[ExpertKey(1, 1)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, force=True)
    assert read_manifest(out) == old
    assert verify(out).is_intact


def test_a_folder_that_is_no_store_is_never_touched(source: FormulaSource, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("ten years")
    for force in (False, True):
        with pytest.raises(StoreError, match="is no store"):
            convert(source, out, force=force)
    assert (out / "thesis.txt").read_text() == "ten years"


def test_an_empty_folder_may_become_the_store(source: FormulaSource, out: Path) -> None:
    out.mkdir(parents=True)
    convert(source, out)
    assert verify(out).is_intact


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ModelError("shard is gone")])
def test_resume_encodes_no_finished_layer_again(
    source: FormulaSource, out: Path, stop: BaseException
) -> None:
    source.fail_at[ExpertKey(1, 2)] = stop
    with pytest.raises(type(stop)):
        convert(source, out)
    assert not out.exists()
    assert "experts-00000.safetensors" in names(out.with_name("store.partial"))
    assert "experts-00001.safetensors" not in names(out.with_name("store.partial"))
    source.fail_at.clear()
    source.encoded.clear()
    convert(source, out)
    assert sorted(source.encoded) == [ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 2)]
    report = verify(out)
    assert report.is_intact
    assert report.records == 6


def interrupt(source: FormulaSource, out: Path) -> Path:
    """Stop a conversion in the second layer; return the work folder."""
    source.fail_at[ExpertKey(1, 0)] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    source.fail_at.clear()
    source.encoded.clear()
    return out.with_name("store.partial")


@pytest.mark.parametrize("damage", ["options", "journal", "size", "file"])
def test_work_that_cannot_be_trusted_is_done_again(
    source: FormulaSource, out: Path, damage: str
) -> None:
    work = interrupt(source, out)
    first = work / "experts-00000.safetensors"
    if damage == "options":
        source.quantization = {"bits": 4, "group": 32}
    elif damage == "journal":
        (work / "journal.json").write_text('{"fingerprint": 1}')
    elif damage == "size":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        first.unlink()
    convert(source, out)
    assert sorted(source.encoded) == ALL
    assert verify(out).is_intact


def test_what_another_job_left_behind_does_not_reach_the_store(
    source: FormulaSource, out: Path
) -> None:
    work = interrupt(source, out)
    (work / "experts-00007.safetensors").write_text("old")
    source.quantization = {"bits": 4, "group": 32}
    convert(source, out)
    assert "experts-00007.safetensors" not in names(out)


def test_a_work_folder_without_a_journal_may_be_somebody_elses(
    source: FormulaSource, out: Path
) -> None:
    work = interrupt(source, out)
    (work / "journal.json").unlink()
    with pytest.raises(StoreError, match="is in the way and not ours"):
        convert(source, out)
    assert (work / "experts-00000.safetensors").is_file()


def test_two_converters_do_not_meet(source: FormulaSource, out: Path) -> None:
    out.parent.mkdir()
    with (
        FileLock(out.with_name(f".{out.name}.lock")),
        pytest.raises(StoreError, match="another process is converting"),
    ):
        convert(source, out)
    convert(source, out)


def test_a_full_disk_is_one_line_and_resumable(
    source: FormulaSource, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workdir.write

    def full(self: Workdir, name: str, pieces: Iterator[bytes]) -> None:
        if name == "experts-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "write", full)
        with pytest.raises(StoreError, match="disk is full") as caught:
            convert(source, out)
    assert "\n" not in str(caught.value)
    source.encoded.clear()
    convert(source, out)
    assert sorted(source.encoded) == ALL[3:]


def test_a_file_is_flushed_little_by_little(
    source: FormulaSource, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(workdir, "_FLUSH_BYTES", 8192)
    monkeypatch.setattr(os, "fsync", spy)
    convert(source, out)
    layers = [size for size in sizes if size >= 8192 and size % 4096 == 0]
    assert {4096 + 4096, 4096 + 8192, 4096 + 3 * 4096, 4096 + 3 * 8192} <= set(layers)


def test_a_folder_that_cannot_be_written(source: FormulaSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        convert(source, tmp_path / "file" / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_file_system_that_takes_no_files(source: FormulaSource) -> None:
    with pytest.raises(StoreError) as caught:
        convert(source, Path("/proc/fate-store"))
    assert str(caught.value).startswith("/proc/fate-store: cannot be written: /proc takes no files")
    assert "\n" not in str(caught.value)
    assert source.encoded == []


def test_a_record_of_the_wrong_size_is_refused(source: FormulaSource, out: Path) -> None:
    source.record = lambda key: memoryview(b"short")  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="layer 0, expert 0: 5 bytes"):
        convert(source, out)
    assert not out.exists()


def test_nothing_appears_under_the_final_name_before_the_end(
    source: FormulaSource, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = convert_module.write_manifest

    def spy(*args: object) -> bytes:
        seen.append(out.exists())
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "write_manifest", spy)
    convert(source, out)
    assert seen == [False]
