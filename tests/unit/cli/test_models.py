"""`fate models` shows the table of families, to people and to programs."""

import json
import subprocess
import sys


def fate(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fate_moe", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_table_names_families_versions_and_reasons() -> None:
    head, *rows = fate("models").splitlines()
    names, *versions = head.split("\t")
    assert names == "model type"
    assert versions[-2:] == ["guessed by", "note"]
    by_name = {row.split("\t")[0]: row.split("\t") for row in rows[:-1]}
    assert by_name["qwen3_moe"][-3:] == ["exact", "cross_layer", ""]
    assert by_name["llama4"][-3:-1] == ["unsupported", ""]
    assert "experts interface" in by_name["llama4"][-1]
    assert rows[-1].endswith(f"exact with transformers {versions[-3]}")


def test_json_holds_the_same() -> None:
    table = json.loads(fate("models", "--json"))
    rows = {family["model_type"]: family for family in table["families"]}
    assert len(table["transformers"]) >= 1
    assert rows["mixtral"]["status"][table["transformers"][-1]] == "exact"
    assert rows["zaya"]["predictor"] in ("cross_layer", "both", "history")
