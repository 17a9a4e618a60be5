"""Do the settings of a comparison run as they are named, within the plan?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fate_moe.bench import compare as module
from fate_moe.bench import present
from fate_moe.bench.compare import SETTINGS, Models, check_names, compare, evaluate_one
from fate_moe.bench.evaluate import Evaluation, Tasks
from fate_moe.bench.likelihood import SCORED_TOKENS
from fate_moe.config import Config
from fate_moe.errors import ConfigError
from fate_moe.types import no_progress

WANTED = Tasks(text="The harbour at the end of the road. " * 8, sequence_tokens=64)


@pytest.fixture
def models(tiny_checkpoint: Path, tmp_path: Path) -> Models:
    return Models(str(tiny_checkpoint), tmp_path / "cache", settings={"experts": "50%"})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that engines are built with."""
    seen: list[Config] = []
    build: Any = module.build

    def spy(store: Path, config: Config, **rest: Any) -> Any:
        seen.append(config)
        return build(store, config, **rest)

    monkeypatch.setattr(module, "build", spy)
    return seen


def test_the_plan_knows_how_many_scores_are_held(
    models: Models, tmp_path: Path, seen: list[Config]
) -> None:
    evaluate_one(models, WANTED, None, tmp_path, no_progress)
    assert [config.limits.scored_tokens for config in seen] == [SCORED_TOKENS]


def test_shares_of_a_hybrid_are_settings_of_their_own(models: Models, seen: list[Config]) -> None:
    found = compare(
        models, ["hybrid@0%", "hybrid@90%"], replace(WANTED, written_tokens=8), no_progress
    )
    assert [c.compute.int2_share for c in seen[1:]] == [0.0, 0.9]
    assert [c.compute.int2 for c in seen] == ["never", "tail", "tail"]
    tokens = found["original"].tokens
    assert tokens == found["hybrid@90%"].tokens
    assert tokens is not None
    assert tokens > 0
    assert tokens % 8 == 0
    assert found["hybrid@90%"].kl != found["hybrid@0%"].kl
    assert "up to 90% of the tokens" in present.markdown(found)
    for wrong in ("hybrid@", "hybrid@5MiB", "hybrid@200%", "int4@10%"):
        with pytest.raises(ConfigError, match="compare: "):
            check_names([wrong], is_written=True)


def test_what_depends_on_memory_in_decode_is_a_setting_of_its_own(
    models: Models, seen: list[Config]
) -> None:
    names = ["int4", "on-miss@12.5%", "bias@99.5"]
    found = compare(models, names, replace(WANTED, written_tokens=8), no_progress)
    assert [c.compute.int2_on_miss for c in seen[1:]] == [0.0, 0.125, 0.0]
    assert [c.compute.routing_bias for c in seen[1:]] == [0.0, 0.0, 99.5]
    assert found["bias@99.5"].report.rerouted > 0
    assert found["bias@99.5"].kl != found["int4"].kl
    table = present.markdown(found)
    assert "what misses and weighs below 12.5%, in 2 bits" in table
    assert "logits of experts in memory raised by 99.5" in table
    for wrong in ("on-miss", "on-miss@0.1", "bias", "bias@much", "bias@-1", "bias@inf"):
        with pytest.raises(ConfigError, match=f"compare: '{wrong}"):
            check_names([wrong], is_written=True)


@pytest.mark.parametrize("name", ["on-miss@12.5%", "bias@0.5"])
def test_what_changes_nothing_in_prompts_is_not_measured_on_prompts(
    name: str, models: Models
) -> None:
    with pytest.raises(ConfigError, match=f"compare: {name} concerns .* add --continuation N or"):
        compare(models, ["int4", name], WANTED, no_progress)
    check_names(["int4", name], is_written=True)


def test_progress_names_the_setting(models: Models) -> None:
    told: set[str] = set()
    found = compare(models, ["int2"], WANTED, lambda what, done, total: told.add(what))
    assert list(found) == ["original", "int2"]
    assert {"original: reading the text", "int2: reading the text"} <= told
    assert {"original: converting experts", "int2: converting experts"} <= told


def test_the_table_shows_what_was_measured(models: Models) -> None:
    found = compare(models, ["int8", "int2"], WANTED, no_progress)
    rows = present.markdown(found).splitlines()
    assert rows[0] == (
        "| setting | perplexity | perplexity change % | KL (nats) | same top token % | what it is |"
    )
    two = found["int2"]
    assert two.perplexity is not None
    assert found["original"].perplexity is not None
    change = 100 * (two.perplexity / found["original"].perplexity - 1)
    assert rows[-1] == (
        f"| int2 | {two.perplexity:.2f} | {change:+.2f} | {two.kl:.4f} | "
        f"{100 * (two.top1_agreement or 0):.1f} | {SETTINGS['int2'].says} |"
    )
    assert rows[2].startswith("| original |")
    assert " - | - | - |" in rows[2]


def test_names_of_question_files_do_not_clash_with_columns(tmp_path: Path) -> None:
    right = {"change": 0.75, "a|b$c$": 1.0}
    one = Evaluation(10.0, 5, 0.5, 0.25, right, {}, 0.5, None)  # type: ignore[arg-type]
    found = {"original": one, "int4": replace(one)}
    rows = present.markdown(found).splitlines()
    assert rows[0] == (
        "| setting | perplexity | perplexity change % | KL (nats) | same top token % | change % | "
        "a\\|b$c$ % | valid JSON % | what it is |"
    )
    assert rows[3].startswith("| int4 | 10.00 | +0.00 | 0.5000 | 25.0 | 75.0 | 100.0 | 50.0 |")
    present.plot(found, tmp_path / "plot.png", "of $one: what")
    assert (tmp_path / "plot.png").stat().st_size > 1000
