"""`fate trace` and `fate simulate`, as a person or a program calls them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fate_moe.cli import app
from fate_moe.cli import simulate as _simulate  # noqa: F401 - registers the command
from fate_moe.cli import trace as _trace  # noqa: F401 - registers the command
from fate_moe.sim.trace import read_trace
from tests.unit.cli.test_commands import refused

ABOUT = {"model": "made up", "num_layers": 1, "num_experts": 4, "top_k": 1}


def fate(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    rows = [{"layers": [[expert]]} for expert in (0, 1, 2, 0, 1, 0, 2)]
    path.write_text("\n".join(json.dumps(row) for row in (ABOUT, *rows)), encoding="utf-8")
    return path


def test_one_cell_as_json(trace: Path) -> None:
    result = fate(
        "simulate", trace, "--cache", "lru", "--allocation", "even", "--predictor", "none",
        "--capacity", "50%", "--expert-bytes", "3MiB", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    asked = ("requests", "hits", "late", "misses", "slots", "bytes_demand", "bytes_speculated")
    assert [data[name] for name in asked] == [7, 1, 0, 6, 2, 6 * 3 * 2**20, 0]
    assert data["hit_rate"] == pytest.approx(1 / 7)


def test_a_sweep(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fate(
        "simulate", trace, "--cache", "lru,belady", "--capacity", "25%,50%", "--jobs", "1",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.strip().splitlines()]
    assert lines[0][:3] == ["model", "capacity", "cache"]
    assert [line[1:3] for line in lines[1:]] == [
        ["25 %", "lru"], ["50 %", "lru"], ["25 %", "belady"], ["50 %", "belady"]
    ]  # fmt: skip
    with (out / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert [row["hits"] for row in csv.DictReader(file)] == ["0", "1", "0", "2"]
    assert (out / "plot.png").stat().st_size > 1000
    assert str(out / "plot.png") in result.stderr


def test_with_a_link_speed_is_predicted(trace: Path, tmp_path: Path) -> None:
    asked = ("simulate", trace, "--cache", "lru", "--capacity", "50%", "--expert-bytes", "1MB",
             "--link", "10MB/s", "--token-ms", "100")  # fmt: skip
    data = json.loads(fate(*asked, "--json").stdout)
    # Six reads of 0.1 s, half of each token's computing after its read; one token hits.
    assert data["decode_tok_s"] == pytest.approx(7 / (6 * 0.15 + 0.1))
    assert data["stall_share"] == pytest.approx(6 * 0.05 / 1.0)
    assert (data["link_bytes_s"], data["late"], data["leases"]) == (10**7, 0, True)
    result = fate(*asked, "--out", tmp_path / "out")
    head, line = (row.split("\t") for row in result.stdout.strip().splitlines())
    assert line[head.index("decode tok/s")] == "7.00"
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000


def test_what_reads_take_from_computing_is_predicted(trace: Path) -> None:
    asked = ("simulate", trace, "--cache", "lru", "--capacity", "50%", "--expert-bytes", "1MB",
             "--link", "10GB", "--token-ms", "100", "--read-us", "5000", "--json")  # fmt: skip
    data = json.loads(fate(*asked).stdout)
    assert data["decode_tok_s"] == pytest.approx(7 / (7 * 0.1 + 6 * 0.005))
    assert (data["read_s"], data["experts_s"], data["stop_s"]) == (0.005, None, 0)
    data = json.loads(fate(*asked, "--experts-ms", "0", "--link", "10MB").stdout)
    assert data["decode_tok_s"] == pytest.approx(7 / (7 * 0.1 + 6 * (0.1 + 0.005)))
    assert data["experts_s"] == 0
    data = json.loads(fate(*asked, "--stop-us", "2000").stdout)
    assert data["decode_tok_s"] == pytest.approx(7 / (7 * 0.1 + 6 * 0.007))
    assert data["stop_s"] == 0.002


def test_rows_as_json(trace: Path) -> None:
    result = fate("simulate", trace, "--cache", "lru,arc", "--predictor", "none,oracle", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [(row["cache"], row["predictor"], row["leases"]) for row in rows] == [
        ("lru", "none", False), ("lru", "oracle", True),
        ("arc", "none", False), ("arc", "oracle", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--cache", "lfuu"], "cache: 'lfuu' is none of arc, belady"),
        (["--cache", "lru,lru"], "cache: 'lru,lru': need different ones"),
        (["--capacity", "3GiB"], "capacity: '3GiB': need a share of all experts, such as 25%"),
        (["--capacity", "0%"], "capacity: '0%': need a share"),
        (["--predictor", "recorded"], "predictor: the trace holds no guesses"),
        (["--link", "1GB"], "--link and --token-ms go together"),
        (["--token-ms", "5"], "--link and --token-ms go together"),
        (["--link", "10%", "--token-ms", "5"], "link: '10%': need bytes per second"),
        (["--read-us", "70"], "read-us: it tells no speed without --link and --token-ms"),
        (["--experts-ms", "7"], "experts-ms: it tells no speed without --link"),
        (["--stop-us", "7"], "stop-us: it tells no speed without --link"),
        (
            ["--link", "1GB", "--token-ms", "5", "--experts-ms", "6"],
            "experts-ms: have 6, need at most the 5 of --token-ms",
        ),
        (["--expert-bytes", "50%"], "expert-bytes: '50%': need a size"),
    ],
)
def test_bad_input_is_one_line(trace: Path, arguments: list[str], why: str) -> None:
    refused(fate("simulate", trace, *arguments), why)


def test_a_trace_that_is_none_is_one_line(tmp_path: Path) -> None:
    refused(fate("simulate", tmp_path / "absent"), "absent: cannot be read: No such file")
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    refused(fate("simulate", tmp_path / "text"), "text: ")


def test_from_a_model_to_a_simulation(tiny_store: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "Who?"}\nWhy\n{"prompt": "Never"}\n', encoding="utf-8")
    out = tmp_path / "tiny.trace"
    result = fate(
        "trace", tiny_store, "--prompts", prompts, "--limit", "2", "-p", "How", "-n", "6",
        "--experts", "60%", "--predictor", "cross_layer", "-o", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["prompts"], data["layers"], data["predictor"]) == (3, 6, "cross_layer")
    assert data["steps"] == 3 * 6  # one for each prompt and new token but the last
    assert data["recall"] > 0
    packed = read_trace(out)  # every layer but the first was guessed in every step
    assert all(None not in list(step.guesses or [None])[1:] for step in packed.steps)
    result = fate("simulate", out, "--predictor", "cross_layer", "--json")
    assert json.loads(result.stdout)["recall"] == data["recall"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "prompts: .*0 lines, need 1 to"),
        ('{"answer": "42"}', "line 1: none of the fields prompt, question"),
        ("{", "line 1: no JSON"),
    ],
)
def test_prompts_that_are_none_are_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "p"
    path.write_text(text, encoding="utf-8")
    refused(fate("trace", "--prompts", path), why)


def test_nothing_to_ask_and_nowhere_to_write_are_one_line(tmp_path: Path) -> None:
    refused(fate("trace"), "prompt: none given; try fate trace -p")
    refused(fate("trace", "-p", "x", "-o", tmp_path / "no" / "t"), "out: .*no such folder")
    refused(fate("trace", "--prompts", tmp_path / "absent"), "prompts: .*absent: cannot be read")
