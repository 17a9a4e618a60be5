"""Distil smolmoe from its dense base model, end to end.

    python scripts/train_smolmoe.py --corpus TRAIN.txt.xz --heldout HELDOUT.txt.xz --work DIR \\
        --out src/fate_moe/reference/smolmoe.safetensors

Loss: Kullback-Leibler divergence from the dense model's next-token distribution, on the corpus and
on chats that the dense model wrote (one row in eight), plus a load-balancing term. Runs on a CPU
(float32) or, when there is one, a CUDA card (bfloat16). The learning rate warms up, stays, and
falls to zero over the last part. A run can be stopped (Ctrl-C, SIGTERM; after the step it is in);
the same command goes on with it, also to another `--tokens`, as if it had never stopped. Everything
it needs again lies in DIR; `log.jsonl` there is the curve. Without `--start` the carving comes
first (carve_smolmoe.py); with a trained recipe there the text goes on where that one's ended.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from carve_smolmoe import add_options, carve_and_save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smolmoe_loss import divergence, perplexity
from smolmoe_student import digest_of, make_student, recipe_of, refresh
from smolmoe_text import (
    SEQUENCE,
    cached_chats,
    dense_model,
    heldout,
    note,
    open_base,
    passages,
)
from torch import Tensor, nn

from fate_moe.reference.recipe import Recipe, read_recipe

CHAT_EVERY = 8  # one row in eight is chat
WARMUP_STEPS = 20
ADAM_STATE = ("exp_avg", "exp_avg_sq")
SAME = ("rows", "rank", "attention_rank", "seed")  # options that a run keeps to its end

# What fits a machine: an H100 works on 32 k tokens at once, a small CPU on 1 k.
DEFAULTS = {
    "cuda": {"tokens": 300_000_000, "rows": 64, "chat_rows": 4000, "chat_batch": 2048,
             "eval_every": 200, "grid_every": 50, "lr": 1.5e-3},
    "cpu": {"tokens": 600_000, "rows": 2, "chat_rows": 80, "chat_batch": 32,
            "eval_every": 50, "grid_every": 25, "lr": 5e-4},
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, chats, log")
    parser.add_argument("--out", type=Path, required=True, help="the finished recipe")
    parser.add_argument("--start", type=Path, help="recipe to begin at; default: carve one")
    parser.add_argument("--rank", type=int, default=88, help="of feed-forward deltas")
    parser.add_argument("--attention-rank", type=int, default=32)
    parser.add_argument("--router-lr", type=float, help="default: that of the rest")
    parser.add_argument("--balance", type=float, default=0.02, help="weight of load balancing")
    parser.add_argument("--decay", type=float, default=0.95, help="share of the run that decays")
    parser.add_argument("--heldout-tokens", type=int, default=4096, help="of the curve")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    helps = {
        "tokens": "to train on", "rows": "sequences of 512 tokens a step",
        "chat_rows": "sequences of chat that are generated", "chat_batch": "chats at once",
        "eval_every": "steps between points of the curve, and between checkpoints",
        "grid_every": "steps between fits of the INT4 scales",
        "lr": "learning rate of deltas and norms",
    }  # fmt: skip
    for name, text in helps.items():
        value = DEFAULTS[kind][name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"{text}; here: {value}")
    add_options(parser)
    chosen = parser.parse_args()
    chosen.router_lr = chosen.router_lr or chosen.lr
    chosen.device = torch.device(kind)
    chosen.dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    return chosen


def batches(text: Tensor, chat: Tensor, rows: int, first: int) -> Iterator[Tensor]:
    """Yield one batch a step for ever: row i of the run depends on i alone."""
    row = first * rows
    while True:
        picked = []
        for i in range(row, row + rows):
            chats = i // CHAT_EVERY
            is_chat = i % CHAT_EVERY == CHAT_EVERY - 1
            picked.append(chat[chats % len(chat)] if is_chat else text[(i - chats) % len(text)])
        row += rows
        yield torch.stack(picked).long()


class Trainer:
    """Student, optimizer and where the run stands."""

    def __init__(self, dense: Any, start: Recipe, options: argparse.Namespace) -> None:
        self.options, self.start, self.dense = options, start, dense
        torch.manual_seed(options.seed)  # chance plays a part in making the student, never later
        self.student = make_student(
            dense, start, options.rank, options.attention_rank, options.dtype
        ).train()
        named = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        routers = [p for n, p in named.items() if n.endswith(".router")]
        rest = [p for n, p in named.items() if not n.endswith(".router")]
        self.named = named
        self.grids = {
            n: b for n, b in self.student.named_buffers() if n.endswith((".scale", ".zero"))
        }
        self.optimizer = torch.optim.AdamW(
            [{"params": rest, "lr": options.lr}, {"params": routers, "lr": options.router_lr}],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        for parameter in named.values():  # what AdamW begins with, so that it can be saved any time
            self.optimizer.state[parameter] = {
                part: torch.zeros_like(parameter) for part in ADAM_STATE
            } | {"step": torch.tensor(0.0)}
        self.head = dense.lm_head.weight.to(options.dtype)
        self.step, self.trained_s = 0, 0.0
        self.mean_kl: Tensor | float | None = None  # on the device: nothing waits for it
        self.loads: Tensor | None = None  # [L, E], running mean; 1 = an even share
        self.stopping = False
        self.replay: Any = None
        self.refresh(True)

    @property
    def steps(self) -> int:
        return self.options.tokens // (self.options.rows * SEQUENCE)

    @property
    def kl(self) -> float | None:
        return None if self.mean_kl is None else float(self.mean_kl)

    def rate(self) -> float:
        """Learning rate as a share of its peak: warm up, stay, fall linearly."""
        left = (self.steps - self.step) / max(1.0, self.options.decay * self.steps)
        return min(1.0, (self.step + 1) / WARMUP_STEPS, left)

    def train_step(self, batch: Tensor) -> None:
        options, began = self.options, time.perf_counter()
        batch = batch.to(options.device)
        with torch.autocast(options.device.type, options.dtype, options.dtype != torch.float32):
            with torch.no_grad():
                wanted = self.dense.model(batch).last_hidden_state.flatten(0, 1)
            have = self.student.model(batch).last_hidden_state
        kl, gradient = divergence(have.detach().flatten(0, 1), wanted, self.head)
        blocks = [layer.mlp for layer in self.student.model.layers]
        balance = torch.stack([block.balance for block in blocks]).mean()
        torch.autograd.backward([have, options.balance * balance], [gradient.view_as(have), None])
        nn.utils.clip_grad_norm_(list(self.named.values()), 1.0, error_if_nonfinite=True)
        share = self.rate()
        for group, peak in zip(
            self.optimizer.param_groups, (options.lr, options.router_lr), strict=True
        ):
            group["lr"] = share * peak
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.refresh(self.step % options.grid_every == 0)
        self.mean_kl = kl if self.mean_kl is None else 0.95 * self.mean_kl + 0.05 * kl
        load = torch.stack([block.load for block in blocks])
        self.loads = load if self.loads is None else 0.95 * self.loads + 0.05 * load
        self.trained_s += time.perf_counter() - began

    def refresh(self, new_grid: bool) -> None:
        """As `refresh`; a card is told its thousands of small kernels once, not in every step."""
        if new_grid or self.options.device.type != "cuda":
            refresh(self.student, new_grid)
            return
        if self.replay is None:
            self.replay = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.replay):
                refresh(self.student, False)
        self.replay.replay()

    def evaluate(self, rows: Tensor) -> float:
        self.student.eval()
        with torch.autocast(
            self.options.device.type, self.options.dtype, self.options.dtype != torch.float32
        ):
            found = perplexity(self.student, rows.to(self.options.device))
        self.student.train()
        return found

    # ---- stopping and going on

    def stop_on_signals(self) -> None:
        """Let Ctrl-C and SIGTERM end `run` after the step it is in."""

        def stop(*_: object) -> None:
            self.stopping = True

        for number in (signal.SIGINT, signal.SIGTERM):  # a background job ignores the first else
            signal.signal(number, stop)

    def same(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on with it must have in common."""
        return {name: getattr(self.options, name) for name in SAME} | {
            "start recipe": digest_of(self.start)
        }

    def save(self) -> None:
        """Write everything a later run needs, under a temporary name first."""
        tensors = {f"weight.{n}": p.detach().cpu() for n, p in self.named.items()}
        for name, parameter in self.named.items():
            for part in ADAM_STATE:
                tensors[f"{part}.{name}"] = self.optimizer.state[parameter][part].cpu()
        tensors |= {f"grid.{n}": grid.cpu() for n, grid in self.grids.items()}
        if self.loads is not None:
            tensors["loads"] = self.loads.cpu()
        facts = {"step": self.step, "trained_s": self.trained_s, "mean_kl": self.kl}
        facts |= self.same()
        fresh = self.options.work / "checkpoint.partial"
        save_file(tensors, fresh, metadata={"facts": json.dumps(facts)})
        fresh.replace(self.options.work / "checkpoint.safetensors")

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one: as if the run had not stopped.

        Raises:
            SystemExit: the checkpoint is of another run.
        """
        path = self.options.work / "checkpoint.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        for name, need in self.same().items():
            have = facts.get(name)
            if have != need:
                raise SystemExit(f"{path}: {name} is {have}, this run needs {need}")
        tensors = load_file(path)
        self.step, self.trained_s, self.mean_kl = (
            facts[name] for name in ("step", "trained_s", "mean_kl")
        )
        loads = tensors.get("loads")
        self.loads = None if loads is None else loads.to(self.options.device)
        for name, parameter in self.named.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            state = self.optimizer.state[parameter]
            state["step"].fill_(self.step)
            for part in ADAM_STATE:
                state[part].copy_(tensors[f"{part}.{name}"])
        for name, grid in self.grids.items():
            grid.copy_(tensors[f"grid.{name}"])
        self.refresh(False)
        return True


def run(trainer: Trainer, text: Tensor, chat: Tensor, rows: Tensor, seen: int = 0) -> None:
    """Train to the last step or a signal; a curve point and a checkpoint now and then.

    seen: tokens that the start recipe was trained on.
    """
    options = trainer.options
    stream = batches(text, chat, options.rows, trainer.step + steps_seen(seen, options.rows))
    began, first = time.perf_counter(), trainer.step
    while trainer.step < trainer.steps and not trainer.stopping:
        trainer.train_step(next(stream))
        last = trainer.step == trainer.steps
        if trainer.step % 10 == 0:
            rate = (trainer.step - first) * options.rows * SEQUENCE
            rate /= time.perf_counter() - began
            left = (trainer.steps - trainer.step) * options.rows * SEQUENCE / rate
            note(
                f"step {trainer.step} of {trainer.steps}: KL {trainer.kl:.3f}, "
                f"load {trainer.loads.min():.2f} to {trainer.loads.max():.2f}, "
                f"{rate:.0f} tokens/s, {left / 60:.0f} min left"
            )
        if trainer.step % options.eval_every == 0 or last:
            record(trainer, rows)
            trainer.save()


def record(trainer: Trainer, rows: Tensor) -> None:
    """Append one point of the curve to log.jsonl."""
    point = {
        "step": trainer.step,
        "tokens": trainer.step * trainer.options.rows * SEQUENCE,
        "trained_s": round(trainer.trained_s),
        "kl": trainer.kl,
        "perplexity": trainer.evaluate(rows),
        "load_min": None if trainer.loads is None else trainer.loads.min().item(),
        "load_max": None if trainer.loads is None else trainer.loads.max().item(),
    }
    note(f"held-out perplexity {point['perplexity']:.2f}")
    with (trainer.options.work / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(point) + "\n")


def cut_log(log: Path, step: int) -> None:
    """Drop the points of the curve beyond `step`, which is where the run goes on."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        log.write_text("".join(kept), encoding="utf-8")


def trained_tokens(path: Path) -> int:
    """Return how many tokens a recipe was trained on; 0 for one that was only carved."""
    with safe_open(path, "pt") as file:
        return int((file.metadata() or {}).get("tokens", 0))


def steps_seen(tokens: int, rows: int) -> int:
    """Return how many steps of this many rows saw so many tokens."""
    return math.ceil(tokens / (rows * SEQUENCE))


def check_paths(options: argparse.Namespace) -> None:
    """Refuse, before hours of work, what would fail after them.

    Raises:
        SystemExit: there is no such start recipe, or no folder for the finished one.
    """
    if options.start and not options.start.is_file():
        raise SystemExit(f"--start {options.start}: no such file")
    if not options.out.parent.is_dir():
        raise SystemExit(f"--out {options.out}: no such folder")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    check_paths(options)
    base = open_base(options.downloads)
    start_path = options.start or options.work / "start.safetensors"
    if not start_path.is_file():  # one that was named is there
        carve_and_save(base, options, start_path)
    start = read_recipe(start_path)
    dense = dense_model(base).to(options.device)
    trainer = Trainer(dense, start, options)
    resumed = trainer.resume()
    rows = heldout(base.tokenizer, options.heldout, options.heldout_tokens)
    chat = cached_chats(dense, base.tokenizer, options)  # slow: after all that may be refused
    seen = trained_tokens(start_path)
    needed = (seen + options.tokens) // SEQUENCE + options.rows
    text = passages(base.tokenizer, options.corpus, needed)
    trainer.stop_on_signals()
    cut_log(options.work / "log.jsonl", trainer.step if resumed else -1)
    if not resumed:
        note(f"dense {perplexity(dense, rows.to(options.device)):.2f}")
        record(trainer, rows)
    run(trainer, text, chat, rows, seen)
    if trainer.step < trainer.steps:
        trainer.save()
        note(f"stopped at step {trainer.step}; the same command goes on")
        return
    tokens = seen + trainer.step * options.rows * SEQUENCE
    facts = {"tokens": str(tokens), "seed": str(options.seed)}
    recipe_of(trainer.student, start).save(options.out, facts)
    note(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
