"""Compare ways to get a two-bit expert: error, perplexity, bytes.

    python scripts/compare_int2.py --text HELDOUT.txt.xz --tokens 4096 --random 1024

Prints a Markdown table with a row for every form and group size. Experts are rounded as `fate
convert` does (balanced where it balances), put into the plain transformers model in one form after
the other, and judged on a text against the checkpoint's own weights; everything else stays as it
is. A matrix whose inputs a group does not divide takes the next smaller one. The forms are in
int2_forms.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from int2_forms import FORMS, HEAD_SHARE, bits_added, bits_read, rebuild
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fate_moe.bench import tasks
from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import read_text
from fate_moe.engine.prepare import default_cache_dir, find_checkpoint
from fate_moe.errors import ConfigError, FateError
from fate_moe.models.checkpoint import CheckpointSource, open_checkpoint
from fate_moe.models.load import quiet_transformers
from fate_moe.quant.balance import BALANCED, balance
from fate_moe.store.format import is_store
from fate_moe.types import ExpertKey

GROUPS = (64, 32, 16)
RANDOM = "random"


@dataclass
class Sums:
    """What one form loses and moves, added up over matrices."""

    head_share: float = HEAD_SHARE
    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    whole: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: int = 0
    read: float = 0.0  # bits
    added: float = 0.0  # bits

    def round(self, form: str, name: str, weight: Tensor, group: int) -> Tensor:
        """Rebuild a matrix and count it; the made-up one moves nothing."""
        fitting = next((g for g in GROUPS if g <= group and weight.shape[1] % g == 0), None)
        if fitting is None:
            raise ConfigError(f"{name}: {weight.shape[1]} inputs, need a multiple of {GROUPS[-1]}")
        made = rebuild(form, weight, fitting, self.head_share)
        self.lost[name] += (weight.float() - made).double().square().sum().item()
        self.whole[name] += weight.double().square().sum().item()
        if name != RANDOM:
            self.weights += weight.numel()
            self.read += weight.numel() * bits_read(form, fitting)
            self.added += weight.numel() * bits_added(form, fitting)
        return made

    def errors(self) -> dict[str, float]:
        """Relative error by matrix: |rebuilt - weight| / |weight|."""
        return {name: (self.lost[name] / self.whole[name]) ** 0.5 for name in self.whole}


class Judge:
    """A checkpoint's model in plain transformers, and what it made of a text before."""

    def __init__(self, checkpoint: Path, text: str, tokens: int) -> None:
        if checkpoint.is_file():
            raise ConfigError(
                f"{checkpoint}: of a GGUF errors are measured alone; leave out --text"
            )
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model = model.eval()
        self._likelihood = Likelihood(self.model, tokens)
        self._rows = tasks.sequences(AutoTokenizer.from_pretrained(checkpoint), text, 512, tokens)
        self._states: list[Tensor] = []
        self.original = self._perplexity(self._states)

    @torch.no_grad()
    def _perplexity(self, states: list[Tensor]) -> float:
        step = lambda done: None  # noqa: E731 - progress is told form by form
        return tasks.perplexity(self._likelihood, self._rows, step, states.append).perplexity

    def columns(self) -> list[str]:
        """Return perplexity, its change in %, KL and the share of the same likeliest token."""
        states: list[Tensor] = []
        found, tokens = self._perplexity(states), sum(map(len, self._rows))
        pairs = zip(states, self._states, strict=True)
        distances = [tasks.divergence(self._likelihood, *pair) for pair in pairs]
        kl, same = (sum(parts) / tokens for parts in zip(*distances, strict=True))
        change = 100 * (found / self.original - 1)
        return [f"{found:.2f}", f"{change:+.2f}", f"{kl:.4f}", f"{100 * same:.1f}"]


def round_experts(
    source: CheckpointSource, model: nn.Module | None, form: str, group: int, sums: Sums
) -> None:
    """Round every expert of a checkpoint, and put it into the model where there is one."""
    is_balanced = bool(source.quantization.get("balanced"))
    for index, layer in enumerate(source.expert_layers):
        module = None if model is None else model.get_submodule(layer.path)
        for expert in range(layer.num_experts):
            tensors = source.expert(ExpertKey(index, expert))
            if is_balanced and layer.linear_in_up:
                balanced = balance(*(tensors[name] for name in BALANCED))
                tensors |= dict(zip(BALANCED, balanced, strict=True))
            for name, weight in tensors.items():
                if weight.dim() != 2:
                    continue
                made = sums.round(form, name, weight, group)
                if module is not None:
                    made = made.mT if layer.transposed else made
                    module.get_parameter(name).data[expert].copy_(made)


def table(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table's lines as they are measured."""
    text = None if options.text is None else read_text(options.text)
    checkpoint = find_checkpoint(options.model, cache_dir=default_cache_dir())
    if is_store(checkpoint):
        raise ConfigError(f"{checkpoint}: a store is rounded already; give its checkpoint")
    chance = torch.Generator().manual_seed(0)
    noise = (
        torch.randn(options.random, options.random, generator=chance) if options.random else None
    )
    cells = [(group, form) for group in options.groups for form in options.forms]
    with open_checkpoint(checkpoint) as source:
        judge = None if text is None else Judge(checkpoint, text, options.tokens)
        for done, (group, form) in enumerate(cells, 1):
            say(f"{done} of {len(cells)}: {form} in groups of {group}")
            sums = Sums(options.head_share)
            round_experts(source, judge and judge.model, form, group, sums)
            if noise is not None:
                sums.round(form, RANDOM, noise, group)
            if done == 1:
                yield from _head_lines(list(sums.errors()), judge)
            figures = [f"{bits / 8 / sums.weights:.4f}" for bits in (sums.read, sums.added)]
            figures += [f"{error:.4f}" for error in sums.errors().values()]
            figures += judge.columns() if judge else []
            yield f"| {group} | {form} | {' | '.join(figures)} |"


def _head_lines(names: Sequence[str], judge: Judge | None) -> Iterator[str]:
    columns = ["group", "form", "bytes read a weight", "bytes more on disk a weight"]
    columns += [f"error of {name}" for name in names]
    if judge:
        yield f"perplexity of the checkpoint's own weights: {judge.original:.2f}\n"
        columns += ["perplexity", "change %", "KL (nats)", "same top token %"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smolmoe", help="smolmoe, a checkpoint or a hub id")
    parser.add_argument("--text", type=Path, help="for perplexity; default: errors alone")
    parser.add_argument("--tokens", type=int, default=4096, help="most of the text")
    parser.add_argument(
        "--random", type=int, default=0, metavar="N", help="and N x N Gaussian weights"
    )
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--head-share", type=float, default=HEAD_SHARE, help="of `both`")
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    options = parser.parse_args(arguments)
    for name, least in (("tokens", 2), ("random", 0), ("threads", 1), ("head_share", 0)):
        if getattr(options, name) < least:
            parser.error(f"{name}: have {getattr(options, name)}, need at least {least}")
    torch.set_num_threads(options.threads)
    try:
        for line in table(options):
            print(line, flush=True)
    except FateError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
