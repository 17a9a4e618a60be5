"""How good is smolmoe? Perplexity, routing and answers of a recipe, beside its dense base model.

    python scripts/measure_smolmoe.py --heldout HELDOUT.txt.xz

Prints one JSON object: perplexity in float32, over sequences of 512, of the dense model, of the
carved one, and with its experts as `fate convert` stores them; how the routers share the load and
how far they can be read ahead; greedy answers to fixed questions.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from carve_smolmoe import SEQUENCE, choices, dense_model, open_base, read_text
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fate_moe.quant.quantize import quantize
from fate_moe.quant.record import choose_group
from fate_moe.reference.base import BaseModel
from fate_moe.reference.recipe import (
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SHARED_WIDTH,
    TOP_K,
    Recipe,
    read_recipe,
)
from fate_moe.reference.smolmoe import RECIPE_PATH, write_checkpoint

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain what a computer program is to a child.",
    "List three healthy breakfast ideas.",
    "Who wrote Romeo and Juliet?",
)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    total = 0.0
    for part in rows.split(4):
        logits = model(part).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows[:, 1:].numel())


@torch.no_grad()
def routing(model: nn.Module, rows: Tensor) -> dict[str, float]:
    """Load, active share and how far ahead the next router can be read."""
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].reshape(-1, HIDDEN_SIZE))
        )
        for layer in model.model.layers
    ]
    model.model(rows)
    for hook in hooks:
        hook.remove()
    gates = [layer.mlp.gate for layer in model.model.layers]
    picked = [choices(gate(x)[0]) for gate, x in zip(gates, inputs, strict=True)]
    ahead = [choices(gates[i + 1](inputs[i])[0]) for i in range(NUM_LAYERS - 1)]
    recall = [(a * b).sum(1).mean() / TOP_K for a, b in zip(ahead, picked[1:], strict=True)]
    near = [F.cosine_similarity(a, b).mean() for a, b in pairwise(inputs)]
    load = torch.stack([one.mean(0) for one in picked]) * (NUM_EXPERTS / TOP_K)
    weights = [gate(x)[1] * TOP_K for gate, x in zip(gates, inputs, strict=True)]
    return {
        "load_min": load.min().item(),
        "load_max": load.max().item(),
        "topk_weight_min": min(w.min().item() for w in weights),
        "topk_weight_max": max(w.max().item() for w in weights),
        "gate_input_cosine": torch.stack(near).mean().item(),
        "cross_layer_recall": torch.stack(recall).mean().item(),
    }


@torch.no_grad()
def round_int4(model: nn.Module) -> None:
    """Round the routed experts in place to what a store of `fate convert` holds."""
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            group = choose_group("expert", weight.shape[-1])
            for expert in weight:
                codes, scale, zero = quantize(expert, group)
                values = codes.unflatten(-1, (-1, group)).float() - zero.float()[..., None]
                expert.copy_((values * scale.float()[..., None]).flatten(-2))


def answers(model: Any, tokenizer: Any) -> dict[str, str]:
    replies = {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        batch = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**batch, max_new_tokens=60, do_sample=False)
        new = out[0, batch["input_ids"].shape[1] :]
        replies[question] = tokenizer.decode(new, skip_special_tokens=True)
    return replies


def measure(base: BaseModel, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, object]:
    ids = base.tokenizer(read_text(arguments.heldout), verbose=False).input_ids
    count = min(arguments.heldout_tokens, len(ids)) // SEQUENCE
    rows = torch.tensor(ids[: count * SEQUENCE]).view(count, SEQUENCE)
    result: dict[str, object] = {"heldout_tokens": rows.numel()}
    result["perplexity_dense"] = perplexity(dense_model(base), rows)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(base, recipe, Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result["perplexity_carved"] = perplexity(model, rows)
    result["active_share_ffn"] = (SHARED_WIDTH + TOP_K * EXPERT_WIDTH) / DENSE_WIDTH
    result |= routing(model, rows[:: max(1, count // 8)])
    result["answers"] = answers(model, base.tokenizer)
    round_int4(model)
    result["perplexity_int4"] = perplexity(model, rows)
    result["answers_int4"] = answers(model, base.tokenizer)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on")
    parser.add_argument("--recipe", type=Path, default=RECIPE_PATH)
    parser.add_argument("--heldout-tokens", type=int, default=8_192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = open_base(arguments.downloads)
    print(json.dumps(measure(base, read_recipe(arguments.recipe), arguments), indent=1))


if __name__ == "__main__":
    main()
