"""Which config does a GGUF describe?

Made here and not by transformers, whose tables know few MoE architectures and leave expert sizes
at the family's defaults.

Invariant: what a family needs and the file does not say is an error, never a default that belongs
to another model. Sources: gguf 0.19, constants.py (keys); llama.cpp, convert_hf_to_gguf.py (what
each key was made from).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_header import GgufHeader, GgufTensor

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}

Entries = dict[str, object]


@dataclass(frozen=True, slots=True)
class Gguf:
    """What all files of a model say together.

    Attributes:
        header: of the first file, which has the metadata.
        tensors: name -> tensor, of all files.
        digests: file name -> fingerprint.
    """

    header: GgufHeader
    tensors: Mapping[str, GgufTensor]
    digests: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The first file, for messages."""
        return self.header.path

    @property
    def architecture(self) -> str:
        """The model's kind in llama.cpp's words, such as "qwen3moe"."""
        value = self.header.metadata.get("general.architecture")
        if not isinstance(value, str) or not value.isprintable():
            raise FormatError(f"{self.path}: general.architecture is {value!r:.80}")
        return value

    def find(self, key: str) -> object:
        """Return the metadata of the architecture's `key`, or None."""
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a count from the metadata; at least 1, or 0 if that is the default.

        Raises:
            ModelError: it is missing and has no default.
            FormatError: it is no count.
        """
        value = self.find(key)
        if value is None and default is not None:
            return default
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]  # one per layer, all alike
        least = 0 if default == 0 else 1
        if type(value) is not int or not least <= value < 1 << 31:
            raise self._wrong(key, value, "a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number from the metadata, the shortest that is the same in float32."""
        value = self.find(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise self._wrong(key, value, "a number")
        return _shortest(float(value))  # type: ignore[arg-type]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            ModelError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name].shape

    def any_shape(self, ending: str) -> tuple[int, ...]:
        """Return the shape of the first layer's tensor with this ending that has one."""
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and name.endswith(f".{ending}"):
                return tensor.shape
        raise ModelError(f"{self.path}: no layer has a tensor {ending}")

    def _wrong(self, key: str, value: object, need: str) -> ModelError | FormatError:
        name = f"{self.architecture}.{key}"
        if value is None:
            return ModelError(f"{self.path}: metadata lacks {name}")
        return FormatError(f"{self.path}: {name} is {value!r:.80}, must be {need}")


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


def _shortest(value: float) -> float:
    # Metadata are float32: 1e-06 was written, 9.999999974752427e-07 is read.
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


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
        "rope_parameters": _rope(gguf),
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


def _rope(gguf: Gguf) -> Entries:
    rope: Entries = {"rope_type": "default", "rope_theta": gguf.number("rope.freq_base", 10000.0)}
    kind = gguf.find("rope.scaling.type") or "none"
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{gguf.path}: rope scaling {kind!r:.40} is none of linear, yarn")
    rope |= {"rope_type": kind, "factor": gguf.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = gguf.count(
            "rope.scaling.original_context_length"
        )
        for key, name in _YARN.items():
            if gguf.find(f"rope.scaling.{key}") is not None:
                rope[name] = gguf.number(f"rope.scaling.{key}")
        if gguf.find("rope.scaling.yarn_log_multiplier") is not None:
            # The file has 0.1 * mscale_all_dim; published configs have mscale equal to it.
            scale = _shortest(gguf.number("rope.scaling.yarn_log_multiplier") * 10)
            rope |= {"mscale": scale, "mscale_all_dim": scale}
    return rope


def _head_dim(gguf: Gguf) -> int:
    per_head = gguf.count("embedding_length") // max(1, gguf.count("attention.head_count"))
    return gguf.count("attention.key_length", gguf.count("rope.dimension_count", per_head))


def _expert_width(gguf: Gguf) -> int:
    """F, from the down matrices [E, D, F]: every file has them, whatever its metadata."""
    return gguf.any_shape("ffn_down_exps.weight")[-1]


def _dense_width(gguf: Gguf) -> int:
    return gguf.count("feed_forward_length", _expert_width(gguf))


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
        "qkv_bias": "blk.0.attn_q.bias" in gguf.tensors,
    }


def _qwen3_moe(gguf: Gguf) -> Entries:
    return {
        "model_type": "qwen3_moe",
        "intermediate_size": _dense_width(gguf),
        "moe_intermediate_size": _expert_width(gguf),
        "num_experts": gguf.count("expert_count"),
        "head_dim": _head_dim(gguf),
        "norm_topk_prob": True,  # llama.cpp does so whatever the file says
    }


def _olmoe(gguf: Gguf) -> Entries:
    clip = gguf.find("attention.clamp_kqv")
    return {
        "model_type": "olmoe",
        "intermediate_size": _expert_width(gguf),
        "num_experts": gguf.count("expert_count"),
        "norm_topk_prob": bool(gguf.find("expert_weights_norm")),
        "clip_qkv": None if clip is None else gguf.number("attention.clamp_kqv"),
    }


def _granite_moe(gguf: Gguf) -> Entries:
    config: Entries = {
        "model_type": "granitemoe",
        "intermediate_size": _expert_width(gguf),
        "num_local_experts": gguf.count("expert_count"),
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
    rope = _rope(gguf)
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
    if gguf.count("expert_gating_func", 1) == 2:  # sigmoid
        return config | {"model_type": "deepseek_v3"}
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
