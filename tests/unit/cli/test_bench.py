"""`fate bench rivals`: the smallest model from end to end, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fate_moe.bench import cgroup, readahead
from fate_moe.bench.cgroup import DiskRate
from fate_moe.cli import app, bench  # noqa: F401
from tests.unit.cli.test_commands import refused


def rivals(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "rivals", *arguments])


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_moe.bench.machine.memory_rates", lambda cores: {1: 1e10})
    monkeypatch.setattr("fate_moe.bench.machine.disk_rates", lambda path: {"4 MiB x 4": 1e9})
    monkeypatch.setattr("fate_moe.bench.machine.both_rates", lambda path, cores: (1e10, 5e8))


def test_the_tiny_shape_alone(tmp_path: Path) -> None:
    out, models = tmp_path / "out", tmp_path / "models"
    result = rivals(
        "tiny", "--limits", "none", "--prompt", "24", "--tokens", "6", "--resident-bits", "16",
        "--threads", "1", "--models", str(models), "--out", str(out), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    stages = {one["stage"]: one for one in data["standings"]}
    assert set(stages) == {"prefill", "decode"}
    assert all(one["state"] == "ok" and one["tok_s"] > 0 for one in stages.values())
    assert stages["decode"]["share"] > 0
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [24, 6]
    assert rows[1]["details"]["experts_capacity"] == 64
    assert data["card"] == json.loads((out / "card.json").read_text())
    assert "| no limit | decode | fate | default |" in (out / "table.md").read_text()
    assert (out / "plot.png").stat().st_size > 1000
    assert "round 1, no limit, decode: fate (default): " in result.stderr
    assert not (models / "tiny" / "model.gguf").exists()  # nobody reads one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["large"], r"shape: 'large' is none of qwen1\.5-moe-a2\.7b"),
        (["tiny", "--resident-bits", "5"], "resident-bits: 5 is none of 4, 8, 16"),
        (["tiny", "--limits", "50%"], "limits: '50%': need none or a size"),
        (["tiny", "--limits", "none,none"], "limits: .* names one twice"),
        (["tiny", "--disk", "fast"], "disk: cannot read 'fast'"),
        (["tiny", "--disk", "9kB"], "disk: '9kB': need none or a size"),
        (["tiny", "--readahead", "far"], "readahead: 'far': need numbers of KiB"),
        (["tiny", "--llama-bench", "/no/llama-bench"], "--llama-bench: /no/llama-bench: no such"),
        (["tiny", "--ik-llama-bench", "/bin/echo"], "--ik-llama-bench: .*is no llama-bench"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = [*arguments, "--models", str(tmp_path), "--out", str(tmp_path / "out")]
    limits = [] if "--limits" in arguments else ["--limits", "none"]
    refused(rivals(*given, *limits), message)
    assert not list(tmp_path.iterdir())  # refused before anything was made


def test_a_disk_held_to_a_rate(tmp_path: Path) -> None:
    disk = readahead.disk_of(tmp_path)
    if disk is None or cgroup.unavailable(None, DiskRate(readahead.device_of(disk), 1 << 30)):
        pytest.skip("no disk can be limited here")
    result = rivals(
        "tiny", "--limits", "none", "--prompt", "24", "--tokens", "6", "--resident-bits", "16",
        "--disk", "100MB/s", "--models", str(tmp_path / "models"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["disk_limit_bytes_s"] == 100_000_000
    assert max(card["disk_bytes_s"].values()) < 150_000_000
    assert "(held to 0.10 GB/s for every program)" in result.stdout


def test_a_disk_that_cannot_be_held_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_disk_root", lambda: None)
    result = rivals("tiny", "--limits", "none", "--disk", "1GB", "--models", str(tmp_path))
    refused(result, "disk limit: no controller|disk: the models lie on no disk")
    assert not list(tmp_path.iterdir())


def test_no_right_to_limit_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "_root", lambda: None)
    result = rivals("tiny", "--models", str(tmp_path), "--out", str(tmp_path / "out"))
    refused(result, r"memory limit: no memory controller is mounted \(--limits none\)")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = rivals("tiny", "--limits", "none", "--resident-bits", "16",
                    "--models", str(tmp_path), "--out", str(tmp_path / "file" / "out"))  # fmt: skip
    refused(result, "out: .*cannot be written")
