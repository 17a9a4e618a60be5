"""Real GGUF files of tiny random models, written the way llama.cpp's converter does.

Names, shapes, orders and keys were compared with files that conversion/ of llama.cpp 0c1e57098 made
of the same families.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fate_moe.models.load import quiet_transformers

BASE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 288, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2, "intermediate_size": 64,
}  # fmt: skip
MLA: dict[str, Any] = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4,
    "norm_topk_prob": False, "routed_scaling_factor": 1.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None, "rms_norm_eps": 1e-6},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 4,
                  "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 32,
                  "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "tie_word_embeddings": True},
    "granitemoe": {"num_local_experts": 4, "embedding_multiplier": 2.0, "logits_scaling": 3.0,
                   "residual_multiplier": 0.5, "attention_multiplier": 0.125},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 32,
                         "attention_multiplier": 0.25},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 32, "sliding_window": 8,
                "rope_parameters": {**YARN, "truncate": False}},
    "deepseek_v2": {**MLA, "q_lora_rank": None},
    "deepseek_v3": {**MLA, "q_lora_rank": 32, "n_group": 2, "topk_group": 1,
                    "norm_topk_prob": True,
                    "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
}  # fmt: skip
ARCHITECTURES = {
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
    "granitemoe": "granitemoe", "granitemoeshared": "granitemoe", "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip
EXACT = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
Types = Callable[[str], Type]


def make_model(family: str, **changes: Any) -> Any:
    """A random model in float32, its weights so large that routing varies."""
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif "rotary" not in name:
                tensor.copy_(torch.randn_like(tensor) * (0.5 if "gate.weight" in name else 0.15))
    return model


def _pairs(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: the halves of a head's rotation in turns."""
    if not heads:
        return weight
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def fuse_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put q, k and v, weights and biases, below each other, as --fuse-qkv does."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, kind = name.rpartition("attn_")
        if kind in ("q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias"):
            ending = kind.rpartition(".")[2]
            parts = [tensors[f"{block}attn_{letter}.{ending}"] for letter in "qkv"]
            name, tensor = f"{block}attn_qkv.{ending}", torch.cat(parts)
        out[name] = tensor
    return out


def llama3_divisors(config: Any) -> Tensor:
    """What the converter writes as rope_freqs.weight, frequency by frequency."""
    rope: Mapping[str, Any] = config.rope_parameters
    turns = [
        rope["original_max_position_embeddings"]
        * rope["rope_theta"] ** (-i / config.head_dim)
        / (2 * np.pi)
        for i in range(0, config.head_dim, 2)
    ]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    out = []
    for count in turns:
        smooth = (count - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if count > high else factor if count < low else middle)
    return torch.tensor(out, dtype=torch.float32)


def split_tensors(family: str, model: nn.Module, *, split_kv: bool) -> dict[str, Tensor]:
    """GGUF name -> tensor, as a converter names and turns them."""
    config: Any = model.config
    table = gguf.get_tensor_name_map(_arch(family), config.num_hidden_layers)
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        block = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        special = _experts(name, tensor, family) or _special(name, tensor)
        if "kv_b_proj" in name and split_kv:
            heads, sizes = config.num_attention_heads, [config.qk_nope_head_dim, config.v_head_dim]
            k, v = tensor.view(heads, -1, tensor.shape[1]).split(sizes, 1)
            special = {"attn_k_b.weight": k.mT, "attn_v_b.weight": v}
        out |= {block + key: value for key, value in special.items()}
        if not special:
            if family in ("mixtral", "granitemoe", "granitemoeshared"):
                heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
                tensor = _pairs(tensor, heads.get(name.split(".")[-2], 0))
            out[str(table.get_name(name, try_suffixes=(".weight", ".bias")))] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _experts(name: str, tensor: Tensor, family: str) -> dict[str, Tensor]:
    if ".experts." not in name:
        return {}
    kind = "bias" if name.endswith("_bias") else "weight"
    is_gpt = family == "gpt_oss"
    tensor = tensor.mT if is_gpt and kind == "weight" else tensor
    if "down_proj" in name:
        return {f"ffn_down_exps.{kind}": tensor}
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if is_gpt else tensor.chunk(2, 1)
    return {f"ffn_gate_exps.{kind}": gate, f"ffn_up_exps.{kind}": up}


def _special(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What gguf's table of names lacks, or what a converter gives another shape."""
    if "shared_mlp.input_linear" in name:
        gate, up = tensor.chunk(2, 0)
        return {"ffn_gate_shexp.weight": gate, "ffn_up_shexp.weight": up}
    if "router" in name:
        return {f"ffn_gate_inp.{name.rpartition('.')[2]}": tensor}
    if name.endswith("shared_expert_gate.weight"):
        return {"ffn_gate_inp_shexp.weight": tensor}
    names = {"e_score_correction_bias": "exp_probs_b.bias", "sinks": "attn_sinks.weight"}
    found = names.get(name.rpartition(".")[2])
    return {found: tensor} if found else {}


def _arch(family: str) -> Any:
    return next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])


def add_metadata(writer: Any, family: str, config: Any, *, split_kv: bool = False) -> None:
    """The keys that llama.cpp's converter writes for the family."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    writer.add_expert_count(experts or config.n_routed_experts)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    rope: Mapping[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if family.startswith("deepseek"):
        _add_mla(writer, config, split_kv=split_kv)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    if family == "mixtral" or family.startswith("granite"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if family in ("qwen3_moe", "gpt_oss"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    if family.startswith("granite"):
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_mla(writer: Any, config: Any, *, split_kv: bool) -> None:
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    if split_kv:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(key)
        writer.add_value_length(value)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_vocab_size(config.vocab_size)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if config.model_type == "deepseek_v3":
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def packed(tensor: Tensor, type_: Type, seed: int = 0) -> np.ndarray[Any, Any]:
    """Quantize; types that gguf cannot write get random blocks with scales of a sound size."""
    data = tensor.numpy()
    try:
        return gguf.quants.quantize(data, type_)
    except NotImplementedError:
        return random_blocks(data.shape, type_, seed)


SCALES = {  # fp16 fields of a block, in bytes from its start
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2),
    Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.IQ3_S: (0,), Type.IQ2_XXS: (0,),
    Type.IQ1_S: (0,), Type.IQ3_XXS: (0,), Type.IQ2_XS: (0,), Type.IQ2_S: (0,),
}  # fmt: skip


def random_blocks(shape: tuple[int, ...], type_: Type, seed: int) -> np.ndarray[Any, Any]:
    """Random bytes, but for the fp16 scales."""
    block, size = gguf.GGML_QUANT_SIZES[type_]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for start in SCALES.get(type_, ()):
        scales = random.uniform(0.0002, 0.002, blocks.shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    if type_ == Type.IQ1_M:  # its scale lies in the highest four bits of four words
        blocks[..., 55] = blocks[..., 55] & 15 | 16
    return blocks.reshape(*shape[:-1], -1)


def add_tokenizer(writer: Any, vocabulary: int, cut: str) -> None:
    """A byte-level tokenizer, as the gpt2 kind of GGUF vocabularies."""
    from tokenizers import pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    words += [f"<unused{i}>" for i in range(vocabulary - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(words)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(words) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ a"])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_gguf(
    path: Path,
    family: str,
    model: Any,
    types: Types,
    *,
    split_kv: bool = False,
    fused: bool = False,
    tokenizer: str = "qwen2",
    files: int = 1,
    drop: str = "",
    extra: Callable[[Any], None] | None = None,
) -> dict[str, Tensor]:
    """Write a model; return the values that its tensors stand for, by GGUF name.

    Args:
        types: GGUF name -> type, of matrices; others are F32.
        fused: q, k and v as one tensor.
        tokenizer: how it cuts words; "" for none.
        files: more than one: split.
        drop: leave out the tensors whose name ends so.
        extra: more metadata.
    """
    limit = {"split_max_tensors": 8} if files > 1 else {}
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family], **limit)
    add_metadata(writer, family, model.config, split_kv=split_kv)
    if tokenizer:
        add_tokenizer(writer, model.config.vocab_size, tokenizer)
    if extra is not None:
        extra(writer)
    values: dict[str, Tensor] = {}
    tensors = split_tensors(family, model, split_kv=split_kv)
    if model.config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(model.config)
    for seed, (name, tensor) in enumerate((fuse_qkv(tensors) if fused else tensors).items()):
        if drop and name.endswith(drop):
            continue
        is_matrix = tensor.dim() > 1 and name.endswith(".weight")
        type_ = types(name) if is_matrix else Type.F32
        data = packed(tensor, type_, seed)
        raw = None if data.dtype in (np.float32, np.float16) else type_
        writer.add_tensor(name, data, raw_dtype=raw)
        shape = tensor.shape
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, type_).copy()).view(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def give_back(family: str, model: Any, values: Mapping[str, Tensor], *, split_kv: bool) -> None:
    """Put values into the model: the inverse of `split_tensors`, found by moving numbers along."""
    tied = model.config.tie_word_embeddings
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not tied}
    flat = torch.zeros(sum(tensor.numel() for tensor in state.values()))
    position = 0
    for tensor in state.values():
        count = tensor.numel()
        tensor.copy_(torch.arange(position, position + count, dtype=torch.float32).view_as(tensor))
        position += count
    assert position < 1 << 24  # every number is a float32
    for name, where in split_tensors(family, model, split_kv=split_kv).items():
        flat[where.long().flatten()] = values[name].float().flatten()
    position = 0
    for tensor in state.values():
        count = tensor.numel()
        tensor.copy_(flat[position : position + count].view_as(tensor))
        position += count
