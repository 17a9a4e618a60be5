"""G8: every family of transformers' experts interface runs as in plain transformers."""

import json
from pathlib import Path

import pytest
import transformers

from fate_moe.errors import ModelError
from fate_moe.models.expert_index import experts_of
from fate_moe.models.families import REFUSED, read_families
from fate_moe.models.load import read_skeleton
from tests.families.exact import check_family, model_types


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in REFUSED])
def test_a_family_runs_exactly(model_type: str, tmp_path: Path) -> None:
    check_family(model_type, tmp_path)


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
