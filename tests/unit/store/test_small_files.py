"""Do small files come along, large ones stay behind, and unreadable ones end in one line?"""

from pathlib import Path

import pytest

from fate_moe.errors import ModelError
from fate_moe.store import small_files as module
from fate_moe.store.convert import convert
from fate_moe.store.small_files import read_small, small_enough, small_files
from tests.unit.store.formula import FormulaSource


@pytest.fixture(autouse=True)
def _low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SMALL_BYTES", 1000)


def test_names_decide_what_comes_along(tmp_path: Path) -> None:
    wanted = ["LICENSE", "config.json", "merges.txt", "tokenizer.model", "x.tiktoken", "y.jinja"]
    unwanted = ["fate.json", "journal.json", "model.safetensors.index.json", "x.py", "x.bin"]
    for name in wanted + unwanted:
        (tmp_path / name).write_text(name)
    templates = tmp_path / "additional_chat_templates"
    (templates / "folder.jinja").mkdir(parents=True)
    (templates / "tool.jinja").write_text("x")
    assert small_files(tmp_path) == [*wanted, "additional_chat_templates/tool.jinja"]


@pytest.mark.parametrize("name", ["training_log.txt", "results.json", "LICENSE", "NOTICE"])
def test_large_files_that_nobody_needs_stay_behind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x" * 1001)
    assert small_files(tmp_path) == []
    (tmp_path / name).write_text("x" * 1000)
    assert small_files(tmp_path) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt",
        "merges.txt", "special_tokens_map.json", "x.tiktoken", "chat_template.json",
        "additional_chat_templates/x.jinja",
    ],
)  # fmt: skip
def test_large_files_that_are_needed_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x" * 1001)
    with pytest.raises(ModelError) as caught:
        small_files(tmp_path)
    assert f"{tmp_path}: {name} has 1001 bytes, need at most 1000" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_size_is_not_small() -> None:
    assert small_enough({"a.txt": None, "b.txt": 0}, "owner/model") == ["b.txt"]
    with pytest.raises(ModelError, match=r"owner/model: config\.json has unknown size"):
        small_enough({"config.json": None}, "owner/model")


def test_no_file_is_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * 1000)
    assert read_small(path) == b"x" * 1000
    path.write_bytes(b"x" * 1001)  # it grew after it was named
    with pytest.raises(ModelError, match=r"config\.json: larger than 1000 bytes"):
        read_small(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_what_cannot_be_read_is_not_blamed_on_the_store(
    source: FormulaSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = source.folder / "tokenizer.json"
    broken.symlink_to("/proc/self/mem")  # opens, and fails at its first byte
    monkeypatch.setattr(source, "small_file", lambda name: read_small(source.folder / name))
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "store")
    assert str(caught.value).startswith(f"{broken}: cannot be read: ")
    assert "written" not in str(caught.value)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone: cannot be read"):
        small_files(tmp_path / "gone")
