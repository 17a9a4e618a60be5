"""Measure how fast long prompts are read, policies and chunk lengths in turns.

    python scripts/measure_prompts.py smolmoe --tokens 4096 --experts 25%,50% --link 20MB \\
        --policies demand@512,demand,tuned,tuned+int2_share=25% --rounds 3

POLICY@N reads the prompt in chunks of N tokens, as engines did that knew nothing of long ones;
without it a chunk is as long as the plan allows. The first policy is what the others are compared
with, round by round. Every engine of a budget is open at once, and each round begins with another
one. Random tokens: a chunk needs nearly all experts, whatever the words. Leave the machine alone
meanwhile, and set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fate_moe.bench.policies import parse_policy
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.config import make_config, parse_size
from fate_moe.engine.build import build
from fate_moe.engine.demands import chunk_sizes
from fate_moe.engine.handle import Engine
from fate_moe.engine.prepare import default_cache_dir, find_store
from fate_moe.errors import FateError
from fate_moe.models.kv_cache import new_cache
from fate_moe.types import Phase, no_progress


@dataclass(frozen=True)
class Took:
    """Of one prompt: seconds, of them waiting; bytes moved, and experts that were needed."""

    seconds: float
    stall_s: float
    moved_bytes: int
    requests: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model or a store, as `fate generate` takes it")
    parser.add_argument("--experts", default="25%,50%", help="budgets, such as 25%%,50%%")
    parser.add_argument("--link", default="none", help="bytes a second, such as 200MB; none")
    parser.add_argument("--policies", default="demand@512,demand,tuned", help="POLICY[@N],...")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="prompts that count, after one")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.tokens < 1:
        parser.error("--rounds and --tokens: need 1 or more")
    return args


def open_engine(store: Path, policy: str, experts: str, bytes_s: float | None, most: int) -> Engine:
    """Open an engine for prompts of at most so many tokens, behind a slower link if asked to."""
    name, changes = parse_policy(policy)
    config = make_config(name, experts=experts, context_tokens=most, **changes)
    if bytes_s is None:
        return build(store, config)
    return build(store, config, slowed=lambda reader: ThrottledReader(reader, bytes_s=bytes_s))


@torch.no_grad()
def read(engine: Engine, ids: Tensor, chunk: int | None) -> Took:
    """Read a prompt [1, T] in chunks into an empty cache."""
    model: Any = engine.model
    engine.reset()
    cache, moved = new_cache(model), engine.mover.telemetry
    began = time.perf_counter()
    sizes = chunk_sizes(ids.shape[1], min(chunk or engine.chunk_tokens, engine.chunk_tokens))
    for piece in torch.split(ids, sizes, dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Took(
        time.perf_counter() - began,
        moved.stall_s,
        moved.bytes_demand + moved.bytes_speculated,
        moved.total(Phase.PREFILL).requests,
    )


def measure(store: Path, experts: str, args: argparse.Namespace) -> list[str]:
    """Read prompts with every policy at one budget; return the table's rows."""
    bytes_s = None if args.link == "none" else float(parse_size(args.link, "link").count_bytes)
    wanted = []
    for spec in args.policies.split(","):
        policy, _, chunk = spec.partition("@")
        wanted.append((spec, policy, int(chunk) if chunk else None))
    engines = [
        open_engine(store, policy, experts, bytes_s, args.tokens + 16) for _, policy, _ in wanted
    ]
    took: list[list[Took]] = [[] for _ in wanted]
    draw = torch.Generator().manual_seed(0)
    vocabulary = int(engines[0].model.get_input_embeddings().weight.shape[0])
    for turn in range(args.rounds + 1):
        ids = torch.randint(10, vocabulary, (1, args.tokens), generator=draw)
        for step in range(len(wanted)):
            which = (turn + step) % len(wanted)
            one = read(engines[which], ids, wanted[which][2])
            print(f"{experts} {wanted[which][0]}: {args.tokens / one.seconds:.1f} tokens/s")
            if turn:
                took[which].append(one)
    for engine in engines:
        engine.close()
    return [
        _row(experts, spec, mine, took[0], args.tokens, bytes_s)
        for (spec, _, _), mine in zip(wanted, took, strict=True)
    ]


def _row(
    experts: str,
    spec: str,
    mine: Sequence[Took],
    first: Sequence[Took],
    tokens: int,
    bytes_s: float | None,
) -> str:
    ratios = [a.seconds / b.seconds for a, b in zip(first, mine, strict=True)]
    seconds = median(one.seconds for one in mine)
    moved = median(one.moved_bytes for one in mine)
    link = "-" if bytes_s is None else f"{moved / seconds / bytes_s:.0%}"
    waiting = median(one.stall_s / one.seconds for one in mine)
    cells = (
        experts, spec, f"{tokens / seconds:.1f}",
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{waiting:.0%}", link,
        f"{moved / 2**30:.2f}", f"{median(one.requests for one in mine):.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        _print_table(args)
    except FateError as error:
        print(f"error: {error}")
        return 2
    return 0


def _print_table(args: argparse.Namespace) -> None:
    store = find_store(args.model, cache_dir=default_cache_dir(), progress=no_progress)
    rows = [row for experts in args.experts.split(",") for row in measure(store, experts, args)]
    titles = (
        "experts",
        "policy",
        "tokens/s",
        "to the first",
        "waiting",
        "link used",
        "GiB",
        "needed",
    )
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    print("\n".join(rows))


if __name__ == "__main__":
    raise SystemExit(main())
