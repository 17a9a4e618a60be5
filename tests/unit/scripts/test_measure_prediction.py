"""The measurement of how near the time model comes to the engine, on a tiny model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest


def test_cells_are_measured_and_predicted_with_the_first_ones_read_cost(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import measure_prediction

    form = replace(measure_prediction.FORM, prompt_tokens=6, new_tokens=8)
    monkeypatch.setattr(measure_prediction, "FORM", form)
    monkeypatch.setattr(sys, "argv", [
        "measure_prediction.py", "--model", str(tiny_store), "--experts", "60%,80%",
        "--link", "1MB", "--out", str(tmp_path),
    ])  # fmt: skip
    measure_prediction.main()
    lines = (tmp_path / "prediction.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert max(0.0, first["own_read_s"]) == first["read_s"] == second["read_s"]
    assert first["took"]["demand"]["reads"] > second["took"]["demand"]["reads"] > 0
    assert first["took"]["resident"]["reads"] == first["took"]["stopping"]["reads"] == 0
    assert first["stop_s"] == second["stop_s"]
    assert first["guess_s"] == max(0.0, first["own_guess_s"])
    assert first["stops"] >= second["stops"] > 0
    # Reads of milliseconds are most of a token's time: the model cannot be far off.
    assert 0.6 < first["predicted"]["demand"] * first["took"]["demand"]["token_s"] < 1.6
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("\t")[:3] for row in rows] == [
        ["1MB", experts, policy] for experts in ("60%", "80%") for policy in ("demand", "tuned")
    ]
    assert head.endswith("ratio\tstolen")
