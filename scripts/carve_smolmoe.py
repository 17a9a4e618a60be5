"""Carve SmolLM2-135M-Instruct into the recipe that train_smolmoe.py begins with.

    python scripts/carve_smolmoe.py --corpus TRAIN.txt.xz --out START.safetensors

No training: every step is a sort, a balanced clustering or a linear least-squares problem. The
layers are carved in order, each on what the carved layers below it hand up, so that a layer's fit
makes up for the errors before it:

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
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from smolmoe_text import SEQUENCE, chats, dense_model, note, open_base, passages
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fate_moe.reference.base import BaseModel
from fate_moe.reference.recipe import (
    DENSE_WIDTH,
    EXPERT_WIDTH,
    NUM_EXPERTS,
    NUM_LAYERS,
    SHARED_WIDTH,
    TOP_K,
    Delta,
    Recipe,
)

BATCH = 8
CHAT_ROWS = 8
SHARED = NUM_EXPERTS  # owner id of the shared expert's neurons
RIDGE = 0.01  # of the mean diagonal of the Gram matrix
LOAD_RANGE = (0.5, 2.0)  # of an even share

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

    def layer(self, index: int) -> tuple[Tensor, Tensor, Delta]:
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
        into = F.pad(into, (0, DENSE_WIDTH - SHARED_WIDTH))  # the routed experts stay
        correction = Delta.of(out[None], into[None])
        stream = stream + shared @ correction.layer(0)[:, :SHARED_WIDTH].T
        load = chosen.mean(0) * (NUM_EXPERTS / TOP_K)
        note(
            f"layer {index}: drift {before:.4f} -> {self.error(stream, dense):.4f}, "
            f"expert load {load.min():.2f} to {load.max():.2f}"
        )

        self.dense = dense.view_as(self.dense)
        self.carved = stream.view_as(self.carved)
        router = router - router.mean(1, keepdim=True)  # softmax does not see the mean
        router = (router / (inputs @ router).std()).T.half()
        return permutation.to(torch.int16), router, correction

    @staticmethod
    def error(stream: Tensor, dense: Tensor) -> float:
        """Mean relative squared distance between the two residual streams."""
        distance = (stream - dense).square().sum(1) / dense.square().sum(1)
        return distance.mean().item()


@torch.no_grad()
def carve(
    base: BaseModel, corpus: Path, *, tokens: int, rank: int, rounds: int, seed: int
) -> Recipe:
    """Return the recipe of an untrained smolmoe."""
    torch.manual_seed(seed)
    model = dense_model(base)
    talk = chats(model, base.tokenizer, CHAT_ROWS, seed)
    text = passages(base.tokenizer, corpus, tokens // SEQUENCE - len(talk))
    sample = torch.cat([talk, text]).long()
    note(f"calibrating on {sample.numel()} tokens, {talk.numel()} of them chat")
    carver = Carver(model, sample, rank, rounds)
    permutations, routers, corrections = zip(
        *(carver.layer(index) for index in range(NUM_LAYERS)), strict=True
    )
    parts = ("out", "scale", "into")
    down = Delta(*(torch.cat([getattr(one, part) for one in corrections]) for part in parts))
    return Recipe(torch.stack(permutations), torch.stack(routers), {"down": down}, {})


def add_options(parser: argparse.ArgumentParser) -> None:
    """What train_smolmoe.py may be told about carving, too."""
    parser.add_argument("--carve-tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--carve-rank", type=int, default=32, help="rank of the correction")
    parser.add_argument("--carve-rounds", type=int, default=6, help="turns of router and clusters")


def carve_and_save(base: BaseModel, options: argparse.Namespace, out: Path) -> None:
    recipe = carve(
        base, options.corpus, tokens=options.carve_tokens, rank=options.carve_rank,
        rounds=options.carve_rounds, seed=options.seed,
    )  # fmt: skip
    recipe.save(out, {"seed": str(options.seed), "tokens": str(options.carve_tokens)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="the recipe file")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    carve_and_save(open_base(options.downloads), options, options.out)


if __name__ == "__main__":
    main()
