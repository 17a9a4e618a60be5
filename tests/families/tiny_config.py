"""How small can a family be, and still be itself?

Starts at the family's default configuration and shrinks every size by its name, so that a family
that is new in transformers needs nothing here. Of layers of several kinds one of each stays.
`ADJUSTED` holds the rest: what a configuration checks or needs beyond that.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 4
VOCABULARY = 320  # tests.tiny's tokenizer has 257 tokens
_SIZES = {
    r"(padded_|text_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"(moe|expert|shared_expert)_(\w+_)?intermediate_size|(expert|moe)_ffn_hidden_size": 32,
    r"expert_hidden_size|moe_latent_size": 32,
    r"hidden_size|n_embd|d_model|embed_dim|embedding_size|hidden_dim|out_hidden_size": 64,
    r"output_size|output_dim|projection_dim|(projector|mm|text)_hidden_size|ple_embed_dim": 64,
    r"(\w+_)?intermediate_size|(\w+_)?ffn_dim|ffn_hidden_size|mlp_dim": 96,
    r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers": LAYERS,
    r"((num|n|encoder|decoder)_)?(attention_)?heads?|num_query_heads|swa_num_attention_heads": 4,
    r"index_n_heads|linear_num_(value_)?heads|mamba_(n|num)_heads": 4,
    r"(num|n|swa_num)_(key_value|kv)_heads|linear_num_key_heads|(mamba_)?n_groups": 2,
    r"(swa_)?(v_)?head_dim|qk_nope_head_dim|linear_((key|value)_)?head_dim|kv_channels": 16,
    r"mamba_d_head|mamba_head_dim": 16,
    r"qk_rope_head_dim|index_head_dim": 8,
    r"(q|kv|o)_lora_rank|router_hidden_size|hc_lowrank|hidden_size_per_layer_input": 16,
    r"mamba_dt_rank|mamba_d_state|ssm_state_size": 16,
    r"(num|n|num_local|n_routed|num_routed|moe_num)_experts": 8,
    r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts": 3,
    r"n_group|topk_group|num_expert_group": 1,
    r"(original_)?max_position_embeddings|max_seq_len|max_sequence_length": 512,
    r"sliding_window|window_size": 8,
    r"num_key_value_groups": 2,
}
_KEPT_WHOLE = (
    "rope_parameters", "rope_scaling", "id2label", "label2id", "projector_patch_to_query_dict",
)  # fmt: skip

_MOE_BLOCK = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3,
              "moe_intermediate_size": 32}  # fmt: skip
ADJUSTED: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3],
                                      "num_experts_per_tok": 3}},
    "deepseek_v2": {"num_experts_per_tok": 3, "first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "diffusion_gemma": {"text_config": _MOE_BLOCK},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "text_config": {"head_dim": 32},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]},
                                        "moe_intermediate_size": [32, 32]}},
    "gemma4": {"text_config": _MOE_BLOCK},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 16, "qk_head_dim": 16}},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_n_groups": 1,
                         "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1,
                                  "indexer_head_dim": 16, "indexer_budget": 8,
                                  "indexer_compress_ratio": 2}},
    "muse_spark": {"audio_config": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 101},
    "step3p7": {"text_config": {"sliding_window": 8, "swiglu_limits": [0.0, 0.5, 0.0, 0.5]}},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Return a configuration of the family with 8 experts and 64 numbers a token."""
    cls = CONFIG_MAPPING[model_type]
    fields = _shrink(cls().to_dict())
    family = model_type.removesuffix("_text")
    whole = ADJUSTED.get(family, {})
    _adjust(fields, whole if family == model_type else whole.get("text_config", whole))
    return cls.from_dict(fields)


def _adjust(fields: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(fields.get(name), dict):
            _adjust(fields[name], value)
        else:
            fields[name] = value


def _shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    layers = fields.get("num_hidden_layers") or fields.get("num_layers") or 0
    kept = _kept_layers(fields, layers)
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config" and value:
            by_layer = {int(layer): one for layer, one in value.items()}
            out[name] = {
                str(new): _shrink_layer(by_layer[old], fields)
                for new, old in enumerate(kept or range(LAYERS))
                if old in by_layer
            }
        elif isinstance(value, Mapping) and name not in _KEPT_WHOLE:
            out[name] = _shrink(value)
        elif isinstance(value, list | tuple) and kept and len(value) == layers:
            out[name] = [value[layer] for layer in kept]
        else:
            out[name] = _size(str(name), value)
    if out.get("qk_rope_head_dim"):
        out |= {"head_dim": 8, "qk_head_dim": 24}
    return _as_many_heads(out, fields)


def _as_many_heads(out: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    heads = "num_key_value_heads", "num_attention_heads"
    if heads[0] in fields and fields[heads[0]] == fields.get(heads[1]):
        out[heads[0]] = out[heads[1]]
    return out


def _shrink_layer(layer: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink what a layer has of its own; twice the others' size stays twice theirs."""
    out = _shrink(layer)
    for name, value in layer.items():
        default = fields.get(name)
        if type(value) is int and type(default) is int and value and default:
            out[name] = max(1, _size(name, default) * value // default)
    return _as_many_heads(out, layer)


def _size(name: str, value: Any) -> Any:
    if type(value) is not int:
        return value
    if name.endswith(("token_id", "token_index")):
        return value if value < VOCABULARY else 100 + value % 50
    return next((size for rule, size in _SIZES.items() if re.fullmatch(rule, name)), value)


def _kept_layers(fields: Mapping[str, Any], layers: int) -> list[int] | None:
    """Choose LAYERS of the layers, one of each kind first; None where no list tells them apart."""
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == layers]
    if not lists or layers <= LAYERS:
        return None
    kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)]
    first = list({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted(first)[:LAYERS]
    rest = [layer for layer in reversed(range(layers)) if layer not in kept]
    return sorted(kept + rest[: LAYERS - len(kept)])
