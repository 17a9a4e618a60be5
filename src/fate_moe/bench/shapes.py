"""Which sizes do the models have whose speed is measured?

Numbers of published configs; what is not named here is transformers' default for the family.
Sources: config.json of Qwen/Qwen1.5-MoE-A2.7B, Qwen/Qwen3-30B-A3B, allenai/OLMoE-1B-7B-0924 and
openai/gpt-oss-20b.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fate_moe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without its weights.

    Attributes:
        name: as the user types it.
        family: transformers' model_type.
        numbers: fields of its config that differ from the family's defaults.
    """

    name: str
    family: str
    numbers: Mapping[str, object]

    def config(self) -> Any:
        """Build the transformers config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.family, dtype="bfloat16", **self.numbers)

    def config_json(self) -> bytes:
        """Write the config as the bytes of a config.json."""
        return (json.dumps(self.config().to_dict(), indent=1, default=str) + "\n").encode()


def _rope(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


_SHAPES = (
    Shape("qwen1.5-moe-a2.7b", "qwen2_moe", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
        "norm_topk_prob": False, "vocab_size": 151936, "max_position_embeddings": 8192,
        "rope_parameters": _rope(1e6),
    }),
    Shape("qwen3-30b-a3b", "qwen3_moe", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": _rope(1e6),
    }),
    Shape("olmoe-1b-7b", "olmoe", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "vocab_size": 50304,
        "max_position_embeddings": 4096, "rope_parameters": _rope(1e4),
    }),
    Shape("gpt-oss-20b", "gpt_oss", {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "sliding_window": 128, "max_position_embeddings": 131072,
    }),
    Shape("tiny", "qwen2_moe", {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 3,
        "norm_topk_prob": False, "vocab_size": 2048, "max_position_embeddings": 1024,
        "rope_parameters": _rope(1e4),
    }),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in _SHAPES}


def find_shape(name: str) -> Shape:
    """Look a shape up.

    Raises:
        ConfigError: there is none by that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"shape: {name!r:.80} is none of {', '.join(SHAPES)}")
    return SHAPES[name]
