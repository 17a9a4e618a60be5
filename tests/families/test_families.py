"""G8: every family of transformers' experts interface runs as in plain transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fate_moe.errors import ModelError
from fate_moe.models.expert_index import experts_of
from fate_moe.models.families import REFUSED, read_families
from fate_moe.models.kv_cache import bytes_per_token, chunks_continue, new_cache
from fate_moe.models.load import Skeleton, read_skeleton
from tests.families.exact import TEXT, auto_class, check_family, model_types
from tests.families.tiny_config import tiny_config

# Their published configurations say it, the default one does not.
NO_TOP_K = ("deepseek_ocr2", "deepseek_v2", "diffusion_gemma", "dots1", "gemma4", "gemma4_text")


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in REFUSED])
def test_a_family_runs_exactly(model_type: str, tmp_path: Path) -> None:
    check_family(model_type, tmp_path)


@pytest.mark.parametrize("model_type", model_types())
def test_a_default_configuration_answers_what_a_plan_asks(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        shape = Skeleton(config, torch.nn.Module(), torch.bfloat16)
    assert min(shape.hidden, shape.vocabulary, shape.max_context, shape.mask_rows) > 0
    assert bytes_per_token(config.get_text_config(), torch.bfloat16) > 0
    if model_type in NO_TOP_K:
        with pytest.raises(ModelError, match="does not say how many experts"):
            assert shape.top_k
    else:
        assert shape.top_k > 0


@pytest.mark.parametrize("model_type", ["gemma4_text", "dots3_note_text", "gpt_oss"])
def test_a_default_configuration_is_planned_with_its_layers_as_they_differ(
    model_type: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(CONFIG_MAPPING[model_type]().to_json_string())
    shape = read_skeleton(tmp_path)
    few, many = (shape.kv_bytes(tokens, torch.bfloat16) for tokens in (100, 1000))
    assert 0 < few < many < 11 * few


@pytest.mark.parametrize("model_type", ["jamba", "minimax", "unlimited_ocr"])
def test_a_family_that_cannot_go_on_from_a_cache_is_given_none(model_type: str) -> None:
    with torch.device("meta"):
        model = auto_class(model_type, TEXT).from_config(tiny_config(model_type))
    shape = Skeleton(model.config, model, torch.float32)
    assert new_cache(model) is None
    assert shape.prefills_whole
    assert not chunks_continue(model)
    assert shape.kv_bytes(100, torch.float32) > shape.kv_bytes(10, torch.float32) > 0


@pytest.mark.parametrize("model_type", model_types(decorated=False))
def test_a_family_outside_of_the_interface_is_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    # The default configuration of dbrx lacks what its published ones have.
    own = {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8}} if model_type == "dbrx" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **own}))
    with pytest.raises(ModelError, match=rf"^{model_type} is an MoE outside of .*fate models"):
        experts_of(read_skeleton(tmp_path).module, model_type)


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe"])
def test_an_encoder_and_decoder_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match="no language model is made of a"):
        read_skeleton(tmp_path)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_family_says_why(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"^{model_type}: .*: not supported; `fate models`"):
        read_skeleton(tmp_path)


def test_the_table_says_what_is_tested_here() -> None:
    version = transformers.__version__
    table = read_families()
    if version not in table.versions:
        pytest.skip(f"the table has no transformers {version}")
    found = {family.model_type: family.status.get(version) for family in table.families}
    expected = dict.fromkeys(model_types(), "exact")
    expected |= dict.fromkeys((*REFUSED, *model_types(decorated=False)), "unsupported")
    assert {name: status for name, status in found.items() if status} == expected
    assert sum(status == "exact" for status in expected.values()) >= 60
