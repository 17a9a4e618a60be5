"""Are evaluation files read as documented, and bad ones refused in one line?"""

import json
import lzma
from pathlib import Path

import pytest

from fate_moe.bench import sets
from fate_moe.bench.sets import Choice, LastWord, read_questions, read_text
from fate_moe.errors import ConfigError

CHOICE = {"query": "Two and two?", "choices": ["three", "four"], "gold": 1, "extra": "ignored"}
LAST = {"context": "He looked at", "continuation": " her"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_both_kinds_are_read(tmp_path: Path) -> None:
    assert (
        read_questions(write(tmp_path / "a.jsonl", CHOICE, "", CHOICE))
        == (Choice("Two and two?", ("three", "four"), 1),) * 2
    )
    assert read_questions(write(tmp_path / "b.jsonl", LAST)) == (LastWord("He looked at", " her"),)


def test_the_limit_keeps_the_first_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{**CHOICE, "query": str(i)} for i in range(9)], "broken")
    assert [one.query for one in read_questions(path, 3)] == ["0", "1", "2"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: must be an object, is list"),
        ({"query": "?", "choices": ["a"], "gold": 0}, "choices must be a list of 2 to 64"),
        ({"query": "?", "choices": ["a", ""], "gold": 0}, "texts that are not empty"),
        ({"query": "?", "choices": ["a", "b"], "gold": 2}, "gold must be an index"),
        ({"query": "?", "choices": ["a", "b"], "gold": True}, "gold must be an index"),
        ({"query": 3, "choices": ["a", "b"], "gold": 0}, "query must be text, is 3"),
        ({"context": "a", "continuation": ""}, "continuation must be text"),
        (LAST, "mixes choices and last words"),
        ("[" * 100_000, "line 2: no JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_questions(write(tmp_path / "bad.jsonl", CHOICE, row))
    assert "bad.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "torn.txt.xz").write_bytes(lzma.compress(b"text" * 1000)[:40])
    (tmp_path / "empty.txt").write_text(" \n")
    for name, says in (("latin.txt", "no UTF-8"), ("torn.txt.xz", "cannot be read"),
                       ("empty.txt", "empty"), ("absent.txt", "cannot be read")):  # fmt: skip
        with pytest.raises(ConfigError, match=says) as caught:
            read_text(tmp_path / name)
        assert name in str(caught.value)
    for name in ("latin.txt", "torn.txt.xz", "empty.txt", "absent.txt"):
        with pytest.raises(ConfigError, match=name):
            read_questions(tmp_path / name)


def test_text_is_read_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("grüße " * 10, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("grüße ".encode() * 10))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.xz") == "grüße " * 10


def test_a_text_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "MAX_TEXT_CHARS", 100)
    (tmp_path / "long.txt.xz").write_bytes(lzma.compress(b"a" * 101))
    with pytest.raises(ConfigError, match="longer than 100 characters; give a part"):
        read_text(tmp_path / "long.txt.xz")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "MAX_LINE_CHARS", 100)
    with pytest.raises(ConfigError, match="line 1 is longer than 100"):
        read_questions(write(tmp_path / "long.jsonl", {**CHOICE, "query": "?" * 200}))


def test_a_file_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.jsonl", *[CHOICE] * 9)
    monkeypatch.setattr(sets, "MAX_TEXT_CHARS", 300)
    with pytest.raises(ConfigError, match="longer than 300 characters"):
        read_questions(path)
    assert len(read_questions(path, 2)) == 2
    monkeypatch.setattr(sets, "MAX_TEXT_CHARS", 10_000)
    monkeypatch.setattr(sets, "MAX_QUESTIONS", 8)
    with pytest.raises(ConfigError, match="over 8 questions"):
        read_questions(path)


@pytest.mark.parametrize("field", ["query", "choices"])
def test_half_a_surrogate_is_no_text(tmp_path: Path, field: str) -> None:
    bad = {"query": "\\ud800", "choices": ["a", "\\ud800"]}[field]
    row = json.dumps({**CHOICE, field: bad}).replace("\\\\", "\\")
    with pytest.raises(ConfigError, match="line 1: (query|a choice) is no text"):
        read_questions(write(tmp_path / "bad.jsonl", row))


def test_what_comes_along_is_whole() -> None:
    prompts = sets.own_json_prompts()
    assert len(prompts) == len(set(prompts)) == 40
    assert all("JSON" in prompt for prompt in prompts)
    assert len(sets.own_text().split()) > 1000
