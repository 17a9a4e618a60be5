"""Measure smolmoe beside its dense base model, and how its routers can be read ahead.

    python scripts/measure_smolmoe.py --heldout HELDOUT.txt.xz --eval FOLDER --log WORK/log.jsonl \\
        --out docs/measurements.md

Fills what stands between the markers `<!-- measure:PART -->` of the document, for every part:
training, chats, routing, quality, precision; draws the plots beside it (docs/plots). The answers
come from the INT4 store, as a user gets them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from carve_smolmoe import choices
from matplotlib.figure import Figure
from measure import fill
from smolmoe_text import dense_model, open_base
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fate_moe.bench import tasks
from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import read_questions, read_text
from fate_moe.config import make_config
from fate_moe.engine.build import build
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.engine.prepare import default_cache_dir, find_checkpoint, find_store
from fate_moe.reference.base import CONTEXT_TOKENS
from fate_moe.reference.recipe import (
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SHARED_WIDTH,
    TOP_K,
)

SETS = ("arc_easy", "hellaswag", "piqa", "lambada")
FAST_SETS = ("arc_easy", "lambada")  # of the comparison of precisions
PREFILL_TOKENS = 64  # prompt length of the union figures
ROUTING_ROWS = 32  # sequences of 512 that routing is measured on
CHATS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain what a computer program is to a child.",
    "List three healthy breakfast ideas.",
    "Who wrote Romeo and Juliet?",
    "How do I make a cup of tea?",
    "What is the difference between a cat and a dog?",
    "Write an email to my boss asking for a day off.",
    "Give me three tips for learning a new language.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on")
    parser.add_argument("--eval", type=Path, required=True, help="folder of arc_easy.jsonl, ...")
    parser.add_argument("--log", type=Path, required=True, help="train_smolmoe.py's log.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the document to fill")
    parser.add_argument("--limit", type=int, help="most questions of each set; default: all")
    parser.add_argument("--tokens", type=int, help="most held-out tokens; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    parser.add_argument(
        "--parts",
        default="training,chats,routing,quality,precision",
        help="which of them; default: all",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plots = options.out.parent / "plots"
    plots.mkdir(exist_ok=True)
    makers = {
        "training": lambda: training(options.log, plots / "smolmoe-training.png"),
        "chats": chats,
        "routing": lambda: routing(options, plots / "smolmoe-routing.png"),
        "quality": lambda: quality(options),
        "precision": lambda: precision(options, plots / "smolmoe-precision.png"),
    }
    for part in options.parts.split(","):
        content = makers[part]()
        text = fill(options.out.read_text(encoding="utf-8"), part, content)
        options.out.write_text(text, encoding="utf-8")


def smolmoe() -> tuple[Any, Any]:
    """The checkpoint in plain transformers, float32, and its tokenizer."""
    checkpoint = find_checkpoint("smolmoe", cache_dir=default_cache_dir())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


def heldout_rows(tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    return tasks.sequences(tokenizer, read_text(options.heldout), 512, options.tokens)


# ---- quality beside the dense model


def quality(options: argparse.Namespace) -> str:
    carved, tokenizer = smolmoe()
    rows = heldout_rows(tokenizer, options)
    dense = dense_model(open_base(options.downloads))
    store = find_store("smolmoe", cache_dir=default_cache_dir())
    engine = build(store, make_config("resident", scored_tokens=64, dtype="float32"))
    models = {
        "dense SmolLM2-135M-Instruct": dense,
        "smolmoe, bf16 weights": carved,
        "smolmoe, INT4 experts": engine.model,
    }
    sets = {name: read_questions(options.eval / f"{name}.jsonl", options.limit) for name in SETS}
    counts = ", ".join(f"{name} {len(questions)}" for name, questions in sets.items())
    lines = [
        f"Held-out text: {sum(map(len, rows))} tokens in sequences of 512. Questions: {counts}. "
        "All computed in float32.\n",
        "| model | perplexity | of dense | " + " | ".join(f"{name} %" for name in SETS) + " |",
        "|---" * (3 + len(SETS)) + "|",
    ]
    first = 0.0
    for name, model in models.items():
        likelihood = Likelihood(model, CONTEXT_TOKENS)
        found = tasks.perplexity(likelihood, rows, lambda done: None).perplexity
        first = first or found
        right = [
            # bf16 against INT4 on questions: the table of precisions has it
            "-"
            if model is carved
            else f"{100 * tasks.accuracy(likelihood, tokenizer, own, lambda done: None):.1f}"
            for own in sets.values()
        ]
        lines.append(f"| {name} | {found:.2f} | {found / first:.3f} | " + " | ".join(right) + " |")
        print(lines[-1], flush=True)
    engine.close()
    active = (SHARED_WIDTH + TOP_K * EXPERT_WIDTH) / DENSE_WIDTH
    lines.append(f"\nActive per token: {active:.1%} of the dense feed-forward weights.")
    return "\n".join(lines) + "\n"


def precision(options: argparse.Namespace, plot: Path) -> str:
    """What `fate eval --compare` says, with its command."""
    names = ["fate", "eval", "smolmoe", "--compare", "int8,int4,int4-minmax,int2,hybrid"]
    names += ["--tokens", "8192", "--limit", "100", "--experts", "50%"]
    files = ["--text", str(options.heldout)]
    files += [
        word for one in FAST_SETS for word in ("--questions", str(options.eval / f"{one}.jsonl"))
    ]
    fate = str(Path(sys.executable).parent / "fate")
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", folder, "--threads", str(options.threads)]
        subprocess.run([fate, *names[1:], *files, *out], check=True)
        table = (Path(folder) / "eval.md").read_text(encoding="utf-8").partition("\n\n")[2]
        shutil.copy(Path(folder) / "eval.png", plot)
    shown = ["--text", options.heldout.name]
    shown += [word for one in FAST_SETS for word in ("--questions", f"{one}.jsonl")]
    return f"`{' '.join(names + shown)}`\n\n{table}\n![precisions](plots/{plot.name})\n"


def training(log: Path, plot: Path) -> str:
    """Table and plot of the training's curve."""
    points = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([p["tokens"] / 1000 for p in points], [p["perplexity"] for p in points], marker="o")
    axis.set(xlabel="thousand tokens", ylabel="held-out perplexity")
    axis.set_title("smolmoe in training (INT4 experts in the forward pass)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(plot, dpi=110)
    lines = [
        "| tokens | minutes | KL | held-out perplexity | expert load |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        kl = "-" if p["kl"] is None else f"{p['kl']:.3f}"
        load = "-" if p["kl"] is None else f"{p['load_min']:.2f} to {p['load_max']:.2f}"
        lines.append(
            f"| {p['tokens']} | {p['trained_s'] / 60:.0f} | {kl} | {p['perplexity']:.2f} | {load} |"
        )
    return "\n".join(lines) + f"\n\n![curve](plots/{plot.name})\n"


def chats() -> str:
    """The ten fixed questions, greedily answered from the INT4 store."""
    store = find_store("smolmoe", cache_dir=default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(store)
    engine = build(store, make_config(experts="50%"))
    parts = []
    for question in CHATS:
        talk = Conversation(engine, tokenizer)
        answer = talk.ask([{"role": "user", "content": question}], Sampling(max_new_tokens=80))
        quoted = "\n".join(f"> {line}".rstrip() for line in answer.text.strip().splitlines())
        parts.append(f"**{question}**\n\n{quoted}\n")
        print(parts[-1], flush=True)
    engine.close()
    return "\n".join(parts)


# ---- routing


@dataclass
class Layer:
    """What one layer's router does on the held-out text: loads, and shares guessed from below."""

    load_min: float
    load_max: float
    cosine: float = math.nan
    decode: float = math.nan
    decode_wide: float = math.nan
    decode_half: float = math.nan
    prefill: float = math.nan


@torch.no_grad()
def gate_inputs(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Gate inputs of every layer, [T, D] each."""
    inputs: list[list[Tensor]] = [[] for _ in range(NUM_LAYERS)]
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].reshape(-1, HIDDEN_SIZE))
        )
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    for row in rows:
        model.model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in inputs]


def decode_recall(scores: Tensor, chosen: Tensor, percentile: float | None) -> float:
    """Share of a token's experts among its guessed ones: top-k, and all above a percentile."""
    guessed = choices(scores).bool()
    if percentile is not None:
        guessed |= scores >= torch.quantile(scores, percentile / 100, dim=1, keepdim=True)
    return ((guessed & chosen).sum(1) / TOP_K).mean().item()


def prefill_recall(scores: Tensor, chosen: Tensor) -> float:
    """The same for prompts of PREFILL_TOKENS: union of what is chosen, union of the guesses."""
    shares = []
    guessed = choices(scores).bool()
    for mine, real in zip(guessed.split(PREFILL_TOKENS), chosen.split(PREFILL_TOKENS), strict=True):
        shares.append((mine.any(0) & real.any(0)).sum() / real.any(0).sum())
    return torch.stack(shares).mean().item()


@torch.no_grad()
def routing(options: argparse.Namespace, plot: Path) -> str:
    model, tokenizer = smolmoe()
    rows = heldout_rows(tokenizer, options)
    inputs = gate_inputs(model, rows[:: max(1, len(rows) // ROUTING_ROWS)])
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    layers = []
    for index, gate in enumerate(gates):
        chosen = choices(inputs[index] @ gate.T).bool()
        load = chosen.float().mean(0) * (NUM_EXPERTS / TOP_K)
        layer = Layer(load.min().item(), load.max().item())
        if index:
            below = inputs[index - 1]
            ahead = below @ gate.T
            layer.cosine = F.cosine_similarity(below, inputs[index]).mean().item()
            layer.decode = decode_recall(ahead, chosen, None)
            layer.decode_wide = decode_recall(ahead, chosen, 75)
            layer.decode_half = decode_recall(ahead, chosen, 50)
            layer.prefill = prefill_recall(ahead, chosen)
        layers.append(layer)
    draw(layers, plot)
    return routing_table(layers, len(inputs[0]), plot)


SHARES = {
    "cosine": ("cosine of adjacent gate inputs", "> 83"),
    "decode": ("recall, decode, top-k", "78.79"),
    "decode_wide": ("recall, decode, and all above the 75th percentile", "97.15"),
    "decode_half": ("recall, decode, and all above the 50th percentile", "-"),
    "prefill": (f"recall, prefill of {PREFILL_TOKENS} tokens (union)", "> 99.6"),
}


def routing_table(layers: list[Layer], tokens: int, plot: Path) -> str:
    lines = [
        f"Over {tokens} held-out tokens, bf16 weights.\n",
        "| measure, mean of layers 1 to 29 | smolmoe % | the paper's figure % |",
        "|---|---|---|",
    ]
    for name, (says, paper) in SHARES.items():
        mean = sum(getattr(layer, name) for layer in layers[1:]) / (NUM_LAYERS - 1)
        lines.append(f"| {says} | {100 * mean:.1f} | {paper} |")
    least, most = min(x.load_min for x in layers), max(x.load_max for x in layers)
    lines.append(f"\nLoad of an expert, 1 = an even share: {least:.2f} to {most:.2f}.\n")
    lines += [
        "| layer | load | " + " | ".join(SHARES) + " |",
        "|---" * (2 + len(SHARES)) + "|",
    ]
    for index, layer in enumerate(layers):
        cells = [getattr(layer, name) for name in SHARES]
        texts = ["-" if math.isnan(cell) else f"{100 * cell:.1f}" for cell in cells]
        lines.append(
            f"| {index} | {layer.load_min:.2f} to {layer.load_max:.2f} | "
            + " | ".join(texts)
            + " |"
        )
    return "\n".join(lines) + f"\n\n![per layer](plots/{plot.name})\n"


def draw(layers: list[Layer], plot: Path) -> None:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, (says, paper) in SHARES.items():
        values = [100 * getattr(layer, name) for layer in layers]
        own = axis.plot(values, marker=".", label=says)[0]
        if paper[-1].isdigit():
            level = float(paper.removeprefix("> "))
            axis.axhline(level, color=own.get_color(), linestyle=":", linewidth=1)
    axis.set(xlabel="layer", ylabel="%", ylim=(None, 101))
    axis.set_title("Reading the next router ahead, smolmoe (dotted: the paper's mean)", fontsize=10)
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(plot, dpi=110)


if __name__ == "__main__":
    main()
