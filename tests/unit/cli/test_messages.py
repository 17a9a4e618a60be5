"""What is wrong with the input, in one line of our own words."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fate_moe.cli import app, main
from fate_moe.cli import calibrate as _calibrate  # noqa: F401 - registers the command
from fate_moe.cli import eval as _eval  # noqa: F401 - registers the command
from fate_moe.cli import generate as _generate  # noqa: F401 - registers the command
from fate_moe.cli import simulate as _simulate  # noqa: F401 - registers the command
from fate_moe.cli import stores as _stores  # noqa: F401 - registers the command
from fate_moe.cli import trace as _trace  # noqa: F401 - registers the command
from tests.unit.cli.test_commands import refused


def fate(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("calibrate --tokens 5", "tokens: have 5, need 2048 to 16777216"),
        ("bench rivals --tokens 9999", "tokens: have 9999, need 2 to 4096"),
        ("bench policies --tokens 0", "tokens: have 0, need 1 to 4096"),
        ("trace --limit 0", "limit: have 0, need 1 or more"),
        ("bench rivals --time-limit 0.5", "time-limit: have 0.5, need 1 or more"),
        ("simulate x --token-ms 0", "token-ms: have 0, need 0.001 to 1000000"),
        ("simulate x --read-us -1", "read-us: have -1, need 0 to 1000000"),
        ("simulate x --experts-ms -1", "experts-ms: have -1, need 0 to 1000000"),
        ("calibrate --tokens many", "tokens: have many, need a whole number, 2048 to 16777216"),
        ("generate -n 2.5", "max-new-tokens: have 2.5, need a whole number"),
        ("generate --temperature warm", "temperature: have warm, need a number"),
        ("generate --no-such", "No such option: --no-such"),
    ],
)
def test_the_parser_of_options_speaks_as_we_do(
    arguments: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # main sets it; gone again after the test
    monkeypatch.setattr(sys, "argv", ["fate", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fate: {line}; try fate --help\n") or "--no-such" in err
    assert len(err.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named_without_numbers(tmp_path: Path) -> None:
    absent = tmp_path / "absent.txt"
    why = "absent.txt: cannot be read: No such file or directory$"
    for command in (("eval", "--text"), ("eval", "--questions"), ("calibrate", "--text"),
                    ("trace", "--prompts")):  # fmt: skip
        refused(fate(command[0], command[1], absent), why)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(fate("trace", "--prompts", tmp_path / "latin.txt"), "latin.txt: it is no UTF-8 text")
    (tmp_path / "text.xz").write_bytes(b"no archive")
    refused(fate("eval", "--text", tmp_path / "text.xz"), "text.xz: cannot be read: .*format")


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"",
        b"Once upon a time there was a king who had three daughters.",
        b'{"a": 1}\n',
        b'{"__metadata__"',
        (8).to_bytes(8, "little") + b"{}      ",  # a safetensors file of something else
    ],
    ids=["short", "empty", "prose", "JSON", "half of JSON", "safetensors"],
)
def test_a_file_that_is_no_trace_is_called_that(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    refused(
        fate("simulate", path),
        r"some\.txt: no trace of what a model's routers chose \(.+\); "
        "fate trace -p TEXT -o FILE makes one$",
    )


def test_a_trace_that_is_damaged_is_not_called_something_else(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"model": "m", "num_layers": 1, "num_experts": 4, "top_k": 1}\n{"layers": 3}')
    refused(fate("simulate", path), "run.jsonl: line 2: need 'layers'")
    refused(fate("simulate", tmp_path / "absent"), "absent: cannot be read: No such file")


def test_without_a_prompt_it_says_how_to_give_one(tiny_store: Path) -> None:
    hint = "prompt: none given and stdin is empty; try fate generate -p 'Why is the sky blue.'$"
    refused(fate("generate", tiny_store, stdin=""), hint)
    refused(fate("generate", tiny_store, "-p", "-", stdin=" \n"), hint)
    refused(fate("generate", tiny_store, "-p", " "), "prompt: it is empty")


def test_a_file_that_is_no_model_is_called_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file.txt").write_text("hello", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # The second has the form of a hub id.
    for name in ("./notes/file.txt", "notes/file.txt", tmp_path / "notes" / "file.txt"):
        for command in ("generate", "convert", "inspect", "verify"):
            asked = ("-p", "x") if command == "generate" else ()
            refused(
                fate(command, name, *asked),
                rf"{name}: is a file; give smolmoe, a folder with a checkpoint or a store, a GGUF "
                r"file, or a hub id \(owner/name\)$",
            )
