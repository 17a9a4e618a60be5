"""`fate eval` as a person and a program meet it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fate_moe.cli import app
from fate_moe.cli import eval as _eval  # noqa: F401 - registers the command

TEXT = "The harbour at the end of the road had not changed much in forty years. " * 4


def fate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "animals.jsonl"
    rows = [{"query": f"Question {i}:", "choices": ["a cat", "dogs"], "gold": i % 2}
            for i in range(6)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def measured(*arguments: object) -> dict[str, Any]:
    result = fate(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_json_holds_the_measures_and_the_report(tiny_store: Path, text: Path) -> None:
    data = measured(tiny_store, "--text", text, "--sequence", 64, "--experts", "50%")
    assert data["tokens"] == len(TEXT) // 64 * 63
    assert 1 < data["perplexity"] < 1e6
    assert data["kl"] is None
    assert data["accuracy"] is None or 0 <= data["accuracy"] <= 1  # of guesses: no clash of names
    assert data["hits"] + data["late"] + data["misses"] == data["requests"] > 0
    assert data["evictions"] > 0  # half of the experts: it ran within its slots
    assert data["peak_rss_bytes"] > 0


def test_every_memory_budget_measures_the_same(tiny_store: Path, text: Path) -> None:
    found = {
        measured(tiny_store, "--text", text, "--sequence", 64, "--experts", share)["perplexity"]
        for share in ("25%", "50%", "100%")
    }
    assert len(found) == 1


def test_questions_and_the_text_that_comes_along(tiny_store: Path, questions: Path) -> None:
    data = measured(tiny_store, "--questions", questions, "--limit", 4, "--experts", "50%")
    assert data["perplexity"] is None
    assert data["asked"] == {"animals": 4}
    flipped = [{**json.loads(line), "gold": 1 - json.loads(line)["gold"]}
               for line in questions.read_text().splitlines()]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, flipped)))
    other = measured(tiny_store, "--questions", questions, "--limit", 4, "--experts", "50%")
    assert data["right"]["animals"] + other["right"]["animals"] == 1  # wrong becomes right
    alone = fate(tiny_store, "--sequence", 64, "--tokens", 128, "--experts", "50%")
    assert alone.exit_code == 0
    assert re.search(r"^perplexity: \d+\.\d\d over 126 tokens$", alone.stdout, re.MULTILINE)
    assert "hit rate" in alone.stderr


def test_the_reference_may_be_a_store_or_the_original(
    tiny_store: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    common = ("--text", text, "--sequence", 64, "--experts", "50%", "--cache-dir", tmp_path / "c")
    itself = measured(tiny_store, *common, "--against", tiny_store)
    assert itself["kl"] == 0
    assert itself["top1_agreement"] == 1
    original = measured(tiny_checkpoint, *common, "--against", "original")
    assert original["kl"] > 0
    named = measured(tiny_store, *common, "--against", tiny_checkpoint)
    assert named["kl"] == original["kl"]
    assert original["perplexity"] == itself["perplexity"]


def test_compare_writes_table_and_plot(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--text", text, "--sequence", 64, "--experts", "50%", "--cache-dir", tmp_path / "c")
    data = measured(tiny_checkpoint, *common, "--compare", "int8,int4,int2,hybrid", "--out", out)
    settings = data["settings"]
    assert list(settings) == ["original", "int8", "int4", "int2", "hybrid"]
    kl = {name: one["kl"] for name, one in settings.items()}
    assert kl["original"] is None
    assert 0 < kl["int8"] < kl["int4"] < kl["hybrid"] < kl["int2"]
    assert "INT8" in settings["int8"]["mode"]
    assert "every expert computed from two bits" in settings["int2"]["mode"]
    table = (out / "eval.md").read_text()
    assert f"| int2 | {settings['int2']['perplexity']:.2f} |" in table
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "int3"), "'int3' is none of original, int8"),
        (("--compare", "int4,int4"), "need different names"),
        (("--compare", "int4", "--against", "original"), "has its own reference"),
        (("--text", "absent.txt"), "absent.txt: cannot be read"),
        (("--questions", "absent.jsonl"), "absent.jsonl: cannot be read"),
        (("--sequence", "1"), "sequence: have 1, need 2 or more"),
        (("--tokens", "0"), "tokens: have 0"),
        (("--limit", "0"), "limit: have 0"),
        (("--json-prompts", "--against", "original"), "it compares on a text"),
        (("--sequence", "300"), "sequence of 300 tokens, the context takes 256"),
    ],
)
def test_bad_input_is_one_line(
    tiny_store: Path, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    refused(fate(tiny_store, "--out", tmp_path / "out", *arguments), message)
    assert not (tmp_path / "out").exists()


def test_a_store_has_no_original(tiny_store: Path, tmp_path: Path) -> None:
    common = ("--cache-dir", tmp_path, "--out", tmp_path / "out")
    refused(fate(tiny_store, "--compare", "int4", *common), "need 16bit; give the checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(
    tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = fate(tiny_checkpoint, "--text", text, "--sequence", 64, "--compare", "int4", "--out",
                  tmp_path / "file", "--cache-dir", tmp_path / "c")  # fmt: skip
    assert result.exit_code == 2
    assert "file is no folder that can be written" in result.stderr
