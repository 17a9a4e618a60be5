"""A tiny random MoE with a real tokenizer, and readers that are slow on purpose."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fate_moe.models.load import quiet_transformers
from fate_moe.store.reader import Mode, RecordReader
from fate_moe.types import ExpertKey

LAYERS, EXPERTS, TOP_K = 6, 16, 3  # three: the order of a sum of two cannot show
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "bos_token_id": 0,
    "eos_token_id": 319,
    "pad_token_id": 0,
}


def make_config(**changes: Any) -> Any:
    return AutoConfig.for_model("qwen2_moe", **{**SIZES, **changes})


def save_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write a random model, its weights so large that routing varies by token and by layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(**changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.0 if "embed" in name else 8.0 if "gate.weight" in name else 10.0)
    with quiet_transformers():
        model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class SlowReader:
    """Passes reads on after a delay, so that guesses can be late and arrivals out of order."""

    def __init__(self, inner: RecordReader, delay_s: Callable[[ExpertKey], float]) -> None:
        self._inner = inner
        self._delay_s = delay_s

    @property
    def mode(self) -> Mode:
        return self._inner.mode

    def record_bytes(self, layer: int) -> int:
        return self._inner.record_bytes(layer)

    def read_into(
        self, key: ExpertKey, buffer: memoryview, start: int = 0, length: int | None = None
    ) -> None:
        time.sleep(self._delay_s(key))
        self._inner.read_into(key, buffer, start, length)

    def close(self) -> None:
        self._inner.close()
