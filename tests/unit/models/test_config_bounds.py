"""Is a config that asks for too many modules refused at once, wherever it says so?"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from fate_moe.errors import FormatError
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.config_bounds import MAX_ITEMS, MAX_LEVELS, check_counts
from fate_moe.models.families import read_families

BIG = 10**9


def nested(levels: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_hidden_layers": BIG}
    for _ in range(levels):
        fields = {"inner": fields}
    return fields


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(FormatError) as caught:
        check_counts(Path("config.json"), fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": BIG}, f"num_hidden_layers is {BIG}, need at most 4096"),
        ({"n_layer": -BIG}, f"n_layer is -{BIG}, need"),
        ({"num_local_experts": BIG}, f"num_local_experts is {BIG}, need at most 65536"),
        ({"vision_config": {"depth": BIG}}, f"vision_config.depth is {BIG}, need at most 4096"),
        ({"a": {"b": {"c": {"num_blocks": BIG}}}}, f"a.b.c.num_blocks is {BIG}"),
        ({"towers": [{"encoder_layers": BIG}]}, f"towers.encoder_layers is {BIG}"),
        ({"vision_config": {"depths": [2, BIG, 2]}}, f"depths is {BIG + 4}, need at most 4096"),
        ({"depths": [[1, BIG]]}, "depths is"),
        ({"depths": [4000, 4000]}, "depths is 8000"),
        ({"num_attention_heads": BIG}, "need at most 65536"),
        ({"layer_types": ["full"] * (MAX_ITEMS + 1)}, f"layer_types has {MAX_ITEMS + 1} items"),
        ({"n_layers": 4096, "ffn_config": {"moe_num_experts": 65536}}, "need at most 4194304"),
        ({"num_layers": int("9" * 4000)}, "num_layers is 999"),
        ({"x\n" * 500: {"depth": BIG}}, ".depth is"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(fields)


def test_levels_are_bounded_and_all_are_looked_at() -> None:
    assert f"num_hidden_layers is {BIG}" in refusal(nested(MAX_LEVELS - 1))
    assert "nested deeper than 32 levels" in refusal(nested(MAX_LEVELS))
    assert "nested deeper than 32 levels" in refusal(nested(100_000))


def test_what_is_no_count_is_free() -> None:
    check_counts(
        Path("config.json"),
        {
            "vocab_size": BIG, "max_position_embeddings": BIG, "eos_token_id": [BIG, BIG],
            "hidden_size": 10**6, "shared_expert_intermediate_size": 10**6, "rope_theta": 1e9,
            "mlp_only_layers": list(range(200)), "layer_types": ["full_attention"] * 200,
            "num_hidden_layers": 200, "num_experts": 1024, "layer_norm_eps": 1e-6,
            "vision_feature_layer": -2, "text_config": None, "use_layers": True,
        },
    )  # fmt: skip


def test_no_family_with_experts_is_refused_as_it_is() -> None:
    seen = 0
    here = (family.model_type for family in read_families().families)
    for family in ("blt", *(name for name in here if name in CONFIG_MAPPING)):
        try:
            fields = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
        except Exception:  # noqa: BLE001 - some have no default, or need what is not here
            continue
        check_counts(Path(family), fields)
        seen += 1
    assert seen > 30


@pytest.mark.parametrize(
    "change", [{"vision_config": {"depth": BIG}}, {"text_config": {"a": {"num_layers": BIG}}}]
)
def test_a_checkpoint_is_refused_before_a_model_is_built(
    change: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(FormatError, match=rf"config\.json: .* is {BIG}, need at most 4096"):
        open_checkpoint(tmp_path)
