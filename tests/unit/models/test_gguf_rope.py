"""Is what turns positions read from a GGUF, or refused: never passed over?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from fate_moe.errors import FateError, FormatError, ModelError
from fate_moe.models.checkpoint import open_checkpoint
from tests.conftest import Open
from tests.unit.models.gguf_files import YARN, llama3_divisors, make_model, write_gguf
from tests.unit.models.test_gguf import check, convert, only, want

Extra = Callable[[Any], None]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def numbers(**values: float) -> Extra:
    """Metadata of a qwen3moe, their dots written as __."""

    def add(writer: Any) -> None:
        for name, value in values.items():
            writer.add_float32(f"qwen3moe.{name.replace('__', '.')}", value)

    return add


def read(folder: Path, extra: Extra, family: str = "qwen3_moe", **changes: Any) -> dict[str, Any]:
    """The rope_parameters that a file with these metadata gives, without rope_theta."""
    model, path = make_model(family, num_hidden_layers=1, **changes), folder / "m.gguf"
    write_gguf(path, family, model, only(Type.F32), extra=extra)
    with open_checkpoint(path) as source:
        config = json.loads((source.folder / "config.json").read_text())
    rope: dict[str, Any] = config["rope_parameters"]
    assert rope.pop("rope_theta") == model.config.rope_parameters["rope_theta"]
    return rope


def kind(name: str, **values: float) -> Extra:
    def add(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(name))
        numbers(**values)(writer)

    return add


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (numbers(rope__scaling__factor=4), {"rope_type": "linear", "factor": 4.0}),
        (numbers(rope__scale_linear=2), {"rope_type": "linear", "factor": 2.0}),
        (numbers(rope__scaling__factor=0), {"rope_type": "default"}),
        (kind("none", rope__scaling__factor=4), {"rope_type": "default"}),
        (kind("linear", rope__scaling__factor=1.5), {"rope_type": "linear", "factor": 1.5}),
        (kind("linear"), {"rope_type": "default"}),
        (
            numbers(rope__scaling__attn_factor=1, rope__scaling__yarn_ext_factor=-1),
            {"rope_type": "default"},
        ),
    ],
)
def test_a_factor_means_what_it_means_to_llama_cpp(
    extra: Extra, expected: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path, extra) == expected


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (numbers(rope__scaling__attn_factor=0.75), "rope.scaling.attn_factor is 0.75, which is"),
        (numbers(rope__scaling__yarn_ext_factor=0.5), "yarn_ext_factor is 0.5, which is not"),
        (numbers(rope__scaling__alpha=1000), "rope.scaling.alpha is 1000.0, which is not"),
        (numbers(rope__scaling__factor=-2), "rope.scaling.factor is -2.0"),
        (numbers(rope__freq_base_swa=1e4), "rope.freq_base_swa is not supported"),
        (numbers(attention__temperature_scale=0.1), "temperature_scale is not supported"),
        (numbers(attention__clamp_kqv=1.5), "clamp_kqv is not supported"),
        (
            lambda w: w.add_array("qwen3moe.attention.sliding_window_pattern", [True, False]),
            "sliding_window_pattern is not supported",
        ),
        (kind("longrope"), "rope scaling 'longrope'"),
        (kind("yarn"), "lacks qwen3moe.rope.scaling.original_context_length"),
    ],
)
def test_what_cannot_be_used_is_refused(extra: Extra, says: str, tmp_path: Path) -> None:
    with pytest.raises(FateError, match=says) as caught:
        read(tmp_path, extra)
    assert "\n" not in str(caught.value)


def test_yarns_own_attention_factor_is_used(tmp_path: Path, open_engine: Open) -> None:
    rope = {**YARN, "attention_factor": 1.3}
    model, path = make_model("qwen3_moe", rope_parameters=rope), tmp_path / "m.gguf"
    values = write_gguf(path, "qwen3_moe", model, only(Type.F32))
    check(convert(path, 16), want("qwen3_moe", model, values), open_engine)


def test_the_unit_of_yarns_logarithm_is_known_of_deepseek_alone(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        numbers(rope__scaling__yarn_log_multiplier=0.1)(writer)

    with pytest.raises(ModelError, match="yarn_log_multiplier is not supported"):
        read(tmp_path, extra, rope_parameters=YARN)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_divisors(
    factor: float, tmp_path: Path, open_engine: Open
) -> None:
    rope = {**LLAMA3, "factor": factor}
    model = make_model("mixtral", rope_parameters=rope, head_dim=16)
    divisors = llama3_divisors(model.config)
    assert len(set(divisors.tolist())) > 2  # some frequencies lie between
    path = tmp_path / "m.gguf"
    values = write_gguf(path, "mixtral", model, only(Type.F32))
    assert torch.equal(values.pop("rope_freqs.weight"), divisors)
    check(convert(path, 16), want("mixtral", model, values), open_engine)
    with open_checkpoint(path) as source:
        config = json.loads((source.folder / "config.json").read_text())
    assert config["rope_parameters"] == rope


@pytest.mark.parametrize(
    ("family", "data", "error", "says"),
    [
        ("mixtral", [1.0] * 7 + [8.0], ModelError, "does not come of the llama3 scaling"),
        ("mixtral", [1.0] * 7 + [float("nan")], ModelError, "does not come of the llama3"),
        ("mixtral", [[1.0, 2.0]], FormatError, r"rope_freqs.weight is F32 \(1, 2\)"),
        ("qwen3_moe", [1.0] * 8, ModelError, "does not come of the llama3 scaling"),
    ],
)
def test_other_divisors_are_refused(
    family: str, data: Any, error: type[FateError], says: str, tmp_path: Path
) -> None:
    def add(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(data, dtype=np.float32))

    with pytest.raises(error, match=says):
        read(tmp_path, add, family)


def test_routers_that_no_family_has_are_refused(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_uint32("deepseek2.expert_gating_func", 4)

    with pytest.raises(ModelError, match="expert_gating_func is 4, supported are 1"):
        read(tmp_path, add, "deepseek_v2", first_k_dense_replace=0)
