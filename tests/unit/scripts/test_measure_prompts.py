"""The measurement of long prompts, on a tiny model."""

from pathlib import Path

import pytest


def test_policies_read_prompts_in_turns_in_chunks_of_their_own(
    tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import measure_prompts

    measure_prompts.main([
        str(tiny_store), "--experts", "40%", "--link", "20MB", "--tokens", "96", "--rounds", "2",
        "--policies", "demand@12,demand,tuned",
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:9]] == [
        f"40% {policy}"
        for turn in range(3)
        for policy in (["demand@12", "demand", "tuned"] * 2)[turn : turn + 3]
    ]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| 40%")]
    assert [row[1] for row in rows] == ["demand@12", "demand", "tuned"]
    assert rows[0][3].startswith("1.00 (1.00 to 1.00)")
    needed = [int(row[-1]) for row in rows]
    assert needed[0] > 3 * needed[1]  # eight chunks need each expert again and again
    assert needed[1] == needed[2]
    assert float(rows[1][2]) > 1.5 * float(rows[0][2])  # one chunk reads each once


def test_a_prompt_that_waits_moves_what_it_waits_for(tiny_store: Path) -> None:
    import measure_prompts
    import torch

    engine = measure_prompts.open_engine(tiny_store, "demand", "30%", 5e6, 64)
    took = measure_prompts.read(engine, torch.randint(10, 250, (1, 40)), None)
    counts = engine.mover.telemetry.total()
    record = engine.blueprint.manifest.layers[0].record_bytes
    assert took.moved_bytes == record * counts.misses > 0
    assert took.requests == counts.requests
    assert 0.5 * took.moved_bytes / 5e6 < took.stall_s < took.seconds
    engine.close()
