"""Which config does a GGUF describe?

Made here and not by transformers, whose tables know few MoE architectures and leave expert sizes
at the family's defaults.

Invariant: what a family needs and the file does not say is an error, never a default that belongs
to another model; a key that changes the output and has no place in the config is one, too.
Sources: gguf 0.19, constants.py (keys); llama.cpp 0c1e57098, conversion/ (base.py, llama.py,
qwen.py, olmo.py, granite.py, gpt_oss.py, deepseek.py: what each key is made from) and src/models/
(which router each architecture has).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from gguf.constants import ExpertGatingFuncType

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_metadata import EMBEDDING, OUTPUT, Gguf
from fate_moe.models.gguf_rope import read_rope

Entries = dict[str, object]

# Keys of attention that other variants of these architectures have; they would change the output.
_UNSUPPORTED = (
    "attention.clamp_kqv",
    "attention.sliding_window_pattern",
    "attention.temperature_length",
    "attention.temperature_scale",
    "rope.freq_base_swa",
)


def write_config(gguf: Gguf, folder: Path) -> None:
    """Write the config.json that a GGUF describes.

    Raises:
        ModelError: an architecture we do not know, or one whose metadata are incomplete.
        FormatError: metadata of the wrong kind or beyond all bounds.
    """
    known = ARCHITECTURES.get(gguf.architecture)
    if known is None:
        raise ModelError(
            f"{gguf.path}: architecture {gguf.architecture!r:.80} is none of the MoE architectures "
            f"read from GGUF: {', '.join(ARCHITECTURES)}; use the model's safetensors"
        )
    if not gguf.count("expert_count", 0):
        raise ModelError(
            f"{gguf.path}: {gguf.architecture}.expert_count is missing or 0: "
            "not a Mixture-of-Experts model"
        )
    for key in _UNSUPPORTED:
        if gguf.find(key) is not None:
            raise ModelError(
                f"{gguf.path}: {gguf.architecture}.{key} is not supported; use the model's "
                "safetensors"
            )
    config = {**_common(gguf), **known(gguf)}
    _check_counts(gguf, config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _check_counts(gguf: Gguf, config: Entries) -> None:
    """Hold the numbers of layers and experts against the tensors: a model is built of them."""
    layers, experts = config["num_hidden_layers"], gguf.count("expert_count")
    if f"blk.{int(str(layers)) - 1}.attn_norm.weight" not in gguf.tensors:
        raise ModelError(f"{gguf.path}: the config has {layers} layers, the last has no tensors")
    have = gguf.any_shape("ffn_down_exps.weight")[0]
    if have != experts:
        raise ModelError(f"{gguf.path}: expert_count is {experts}, the tensors have {have}")


def _common(gguf: Gguf) -> Entries:
    vocabulary, hidden = gguf.shape(EMBEDDING)[0], gguf.count("embedding_length")
    heads = gguf.count("attention.head_count")
    config: Entries = {
        "dtype": _dtype(gguf),
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": gguf.count("block_count") - gguf.count("nextn_predict_layers", 0),
        "max_position_embeddings": gguf.count("context_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.count("attention.head_count_kv", heads),
        "rms_norm_eps": gguf.number("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": gguf.count("expert_used_count"),
        "rope_parameters": read_rope(gguf),
        "tie_word_embeddings": OUTPUT not in gguf.tensors,
    }
    return config | _special_tokens(gguf)


def _dtype(gguf: Gguf) -> str:
    plain = {"BF16": "bfloat16", "F16": "float16"}
    return plain.get(gguf.tensors[EMBEDDING].type, "float32")


def _special_tokens(gguf: Gguf) -> Entries:
    def token(name: str) -> int | None:
        value = gguf.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        rows = gguf.shape(EMBEDDING)[0]
        return value if type(value) is int and 0 <= value < rows else None

    # A chat model ends its turn with "eot", a text with "eos"; llama.cpp stops at either.
    ends = [token(name) for name in ("eos", "eot")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": token("bos"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": token("padding"),
    }


def _head_dim(gguf: Gguf) -> int:
    per_head = gguf.count("embedding_length") // max(1, gguf.count("attention.head_count"))
    return gguf.count("attention.key_length", gguf.count("rope.dimension_count", per_head))


def _expert_width(gguf: Gguf) -> int:
    """F, from the down matrices [E, D, F]: every file has them, whatever its metadata."""
    return gguf.any_shape("ffn_down_exps.weight")[-1]


def _dense_width(gguf: Gguf) -> int:
    return gguf.count("feed_forward_length", _expert_width(gguf))


def _has_biases(gguf: Gguf) -> bool:
    """Whether q, k and v have biases, be they one tensor."""
    return not gguf.tensors.keys().isdisjoint(("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"))


def _mixtral(gguf: Gguf) -> Entries:
    return {
        "model_type": "mixtral",
        "intermediate_size": _expert_width(gguf),
        "num_local_experts": gguf.count("expert_count"),
        "head_dim": _head_dim(gguf),
        "sliding_window": None,
    }


def _qwen2_moe(gguf: Gguf) -> Entries:
    return {
        "model_type": "qwen2_moe",
        "intermediate_size": _dense_width(gguf),
        "moe_intermediate_size": _expert_width(gguf),
        "shared_expert_intermediate_size": gguf.any_shape("ffn_down_shexp.weight")[-1],
        "num_experts": gguf.count("expert_count"),
        "norm_topk_prob": bool(gguf.find("expert_weights_norm")),
        "qkv_bias": _has_biases(gguf),
    }


def _qwen3_moe(gguf: Gguf) -> Entries:
    return {
        "model_type": "qwen3_moe",
        "intermediate_size": _dense_width(gguf),
        "moe_intermediate_size": _expert_width(gguf),
        "num_experts": gguf.count("expert_count"),
        "head_dim": _head_dim(gguf),
        "norm_topk_prob": True,  # llama.cpp does so whatever the file says
        "attention_bias": _has_biases(gguf),
    }


def _olmoe(gguf: Gguf) -> Entries:
    return {
        "model_type": "olmoe",
        "intermediate_size": _expert_width(gguf),
        "num_experts": gguf.count("expert_count"),
        "norm_topk_prob": bool(gguf.find("expert_weights_norm")),
        "attention_bias": _has_biases(gguf),
    }


def _granite_moe(gguf: Gguf) -> Entries:
    config: Entries = {
        "model_type": "granitemoe",
        "intermediate_size": _expert_width(gguf),
        "num_local_experts": gguf.count("expert_count"),
        "attention_bias": _has_biases(gguf),
        "embedding_multiplier": gguf.number("embedding_scale", 1.0),
        "residual_multiplier": gguf.number("residual_scale", 1.0),
        "attention_multiplier": gguf.number("attention.scale", 1.0),
        "logits_scaling": gguf.number("logit_scale", 1.0),
    }
    if any(name.endswith(".ffn_down_shexp.weight") for name in gguf.tensors):
        shared = gguf.any_shape("ffn_down_shexp.weight")[-1]
        config |= {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return config


def _gpt_oss(gguf: Gguf) -> Entries:
    rope = read_rope(gguf)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # of this family alone; the file does not say
    return {
        "model_type": "gpt_oss",
        "intermediate_size": _expert_width(gguf),
        "num_local_experts": gguf.count("expert_count"),
        "head_dim": _head_dim(gguf),
        "sliding_window": gguf.count("attention.sliding_window"),
        "rope_parameters": rope,
    }


def _deepseek(gguf: Gguf) -> Entries:
    rope_dim = gguf.count("rope.dimension_count")
    # Files since 2025 count the compressed heads in key_length, and the model's own in *_mla.
    key = gguf.count("attention.key_length_mla", gguf.count("attention.key_length"))
    value = gguf.count("attention.value_length_mla", gguf.count("attention.value_length"))
    if not rope_dim < key:
        raise FormatError(f"{gguf.path}: attention.key_length is {key}, rope takes {rope_dim}")
    groups = gguf.count("expert_group_count", 1)
    config: Entries = {
        "intermediate_size": _dense_width(gguf),
        "moe_intermediate_size": _expert_width(gguf),
        "first_k_dense_replace": gguf.count("leading_dense_block_count", 0),
        "n_routed_experts": gguf.count("expert_count"),
        "n_shared_experts": gguf.count("expert_shared_count", 0),
        "routed_scaling_factor": gguf.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(gguf.find("expert_weights_norm")),
        "n_group": groups,
        "topk_group": gguf.count("expert_group_used_count", 1),
        "num_key_value_heads": gguf.count("attention.head_count"),
        "kv_lora_rank": gguf.count("attention.kv_lora_rank"),
        "q_lora_rank": gguf.count("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": value,
    }
    scores = gguf.count("expert_gating_func", 1)
    if scores == ExpertGatingFuncType.SIGMOID:
        return config | {"model_type": "deepseek_v3"}
    if scores != ExpertGatingFuncType.SOFTMAX:
        raise ModelError(
            f"{gguf.path}: {gguf.architecture}.expert_gating_func is {scores}, supported are "
            "1 (softmax) and 2 (sigmoid)"
        )
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return config | {"model_type": "deepseek_v2", "topk_method": method}


ARCHITECTURES: Mapping[str, Callable[[Gguf], Entries]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "granitemoe": _granite_moe,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek,
}
