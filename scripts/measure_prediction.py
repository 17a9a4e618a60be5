"""Measure how near the time model of `fate simulate` comes to the engine, on the same tokens.

    python scripts/measure_prediction.py --experts 25%,12.5%,50% --link 200MB,1GB,none --out DIR

In every cell (a budget and a link) the policies resident, demand and tuned answer the same prompts
in turns. Resident tells what a token and its experts take; the same with stops, what a layer takes
more that is not passed; guessing with everything resident, what guesses take; `demand` in the
first cell, what a read takes from computing (docs/traces.md). All other cells are predicted with
that. `tuned` stops guessing where that is quicker: so does its prediction. Leave the machine alone
meanwhile, and set OMP_WAIT_POLICY=PASSIVE; `stolen` says how many cores' time a virtual machine's
host gave to others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from fate_moe.bench.policies import Form, parse_policy, requests_of
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.cache import make_cache
from fate_moe.config import make_config, parse_size
from fate_moe.engine.build import build
from fate_moe.engine.handle import Engine
from fate_moe.engine.prepare import default_cache_dir, find_store
from fate_moe.engine.record import Recorder
from fate_moe.models.kv_cache import new_cache
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.timeline import Link, time_decode
from fate_moe.sim.trace import Trace
from fate_moe.types import Phase, no_progress

PROMPTS = (
    "Explain why the sky is blue and the sunset is red, to a child who asks about everything.",
    "A farmer has 17 sheep. All but nine run away. How many sheep does he have? Think.",
    "Write a function that returns the longest word of a sentence, and three tests for it.",
    "Write a short letter to a friend who has moved to another city.",
)
FORM = Form((), (), (), 1, prompt_tokens=32, new_tokens=64, warm_ups=1)
ALWAYS = "tuned+window=99"  # with a window there is no choice: guesses are always made
ENDS = ("resident", "stopping")


@dataclass(frozen=True)
class Took:
    """Of a token, in seconds; `reads`: demands; `link_bytes_s`: as the engine measured it."""

    token_s: float
    lease_s: float
    stall_s: float
    reads: float
    link_bytes_s: float


def open_engine(store: Path, policy: str, experts: str | None, bytes_s: float | None) -> Engine:
    """Open one, behind a slower link if `bytes_s` says so."""
    name, changes = parse_policy(policy)
    context = FORM.prompt_tokens + FORM.new_tokens + 8
    config = make_config(name, experts=experts, context_tokens=context, **changes)
    slowed = None if bytes_s is None else partial(ThrottledReader, bytes_s=bytes_s)
    return build(store, config, slowed=slowed) if slowed else build(store, config)


@torch.no_grad()
def answer(engine: Engine, ids: Tensor) -> float:
    """Read a prompt, write greedily, return the seconds of writing."""
    model: Any = engine.model
    cache = new_cache(model)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    began_s = time.perf_counter()
    for _ in range(FORM.new_tokens):
        token = logits[:, -1:].argmax(dim=-1)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    logits.flatten()[:1].tolist()
    return time.perf_counter() - began_s


def measure(engines: Mapping[str, Engine], requests: Sequence[Tensor]) -> dict[str, Took]:
    """Let engines answer in turns; the first request warms them up. Medians of the turns."""
    for engine in engines.values():
        answer(engine, requests[0])
    found: dict[str, list[Took]] = {name: [] for name in engines}
    for request in requests[1:]:
        for name, engine in engines.items():
            engine.mover.reset()
            seconds, told = answer(engine, request), engine.mover.telemetry
            leases, misses = told.leases[Phase.DECODE], told.total(Phase.DECODE).misses
            tokens = FORM.new_tokens
            found[name].append(
                Took(seconds / tokens, leases.lease_s / tokens, leases.stall_s / tokens,
                     misses / tokens, engine.mover.link.bytes_per_s or 0.0)
            )  # fmt: skip
    return {
        name: Took(*(median(values) for values in zip(*map(astuple, turns), strict=True)))
        for name, turns in found.items()
    }


def stolen() -> float:
    """Return the processor seconds given to others so far; 0 where the system does not tell."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def record(store: Path, requests: Sequence[Tensor]) -> tuple[Trace, Trace]:
    """Return what is chosen and guessed for all requests, and for the first alone."""
    engine = open_engine(store, ALWAYS, "25%", None)
    try:
        with Recorder(engine) as recorder:
            answer(engine, requests[0])
            first = len(recorder.trace.steps)
            for request in requests[1:]:
                answer(engine, request)
    finally:
        engine.close()
    trace = recorder.trace
    return trace, replace(trace, steps=trace.steps[:first])


def predict(
    traces: tuple[Trace, Trace], engine: Engine, guesser: str, link: Link
) -> tuple[float, float]:
    """Return a token's seconds in a cell with the engine's slots, and the layers not passed."""
    table, cache = engine.mover.table, engine.blueprint.config.cache.cache
    whole, first = (
        time_decode(
            trace, table.regions, partial(make_cache, cache), make_guesser(guesser, trace),
            trace.record_bytes or (), link, spare_slots=table.spare_slots,
        )
        for trace in traces
    )  # fmt: skip
    steps = whole.steps - first.steps
    return (whole.seconds - first.seconds) / steps, (whole.stops - first.stops) / steps


def run_cell(
    store: Path, requests: Sequence[Tensor], ends: Mapping[str, Engine],
    cell: tuple[str, str | None], traces: tuple[Trace, Trace], guess_s: float,
    costs: tuple[float | None, float | None],
) -> dict[str, Any]:  # fmt: skip
    """Measure a cell and predict it.

    Args:
        ends: with everything resident, all layers passed, and none.
        costs: what a read takes from computing, and what a layer takes that is not passed; what
            is None is measured here.
    """
    experts, rate = cell
    bytes_s = None if rate is None else float(parse_size(rate, "link").count_bytes or 0)
    engines = dict(ends)
    engines |= {name: open_engine(store, name, experts, bytes_s) for name in ("demand", "tuned")}
    try:
        began_s, stolen_s = time.perf_counter(), stolen()
        took = measure(engines, requests)
        lost = (stolen() - stolen_s) / (time.perf_counter() - began_s)
        base, demand = took["resident"], took["demand"]
        read_s, stop_s = costs
        if stop_s is None:
            layers = len(engines["resident"].layers)
            stop_s = max(0.0, took["stopping"].token_s - base.token_s) / layers
        link = Link(
            bytes_s or demand.link_bytes_s, base.token_s, guess_s=guess_s,
            experts_s=base.lease_s, stop_s=stop_s,
        )  # fmt: skip
        _, stops = predict(traces, engines["demand"], "none", link)
        own_s = demand.token_s - demand.stall_s - base.token_s - stops * stop_s
        own_s /= demand.reads
        link = replace(link, read_s=max(0.0, own_s) if read_s is None else read_s)
        demand_s, _ = predict(traces, engines["demand"], "none", link)
        levels = [predict(traces, engines["tuned"], name, link)[0] for name in ("none", "recorded")]
    finally:
        for name in ("demand", "tuned"):
            engines[name].close()
    return {
        "experts": experts, "link": rate or "none", "read_s": link.read_s, "own_read_s": own_s,
        "stop_s": stop_s, "stops": stops, "stolen": lost,
        "predicted": {"demand": 1 / demand_s, "tuned": 1 / min(levels)},
        "took": {name: asdict(one) for name, one in took.items()},
    }  # fmt: skip


def main() -> None:
    """Measure, and print a line for each policy in each cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smolmoe")
    parser.add_argument("--experts", default="25%,12.5%,50%,75%")
    parser.add_argument("--link", default="200MB,1GB,none")
    parser.add_argument("--read-us", type=float, help="instead of measuring it in the first cell")
    parser.add_argument("--stop-us", type=float, help="the same")
    parser.add_argument("--out", type=Path, required=True, help="receives prediction.jsonl")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    store = find_store(asked.model, cache_dir=default_cache_dir(), progress=no_progress)
    requests = requests_of(store, PROMPTS, FORM)
    traces = record(store, requests)
    ends = {name: open_engine(store, "resident", None, None) for name in ENDS}
    ends["stopping"].mover.benefit.level = 1  # as if there were guesses to make
    always = open_engine(store, ALWAYS, "100%", None)
    always.mover.benefit.levels = 2  # once per layer, as the stops are
    took = measure({"stopping": ends["stopping"], ALWAYS: always}, requests)
    always.close()
    own_guess_s = took[ALWAYS].token_s - took["stopping"].token_s
    guess_s = max(0.0, own_guess_s)
    given = [None if us is None else us / 1e6 for us in (asked.read_us, asked.stop_us)]
    print("link\texperts\tpolicy\tpredicted\treached\tratio\tstolen", flush=True)
    with (asked.out / "prediction.jsonl").open("w", encoding="utf-8") as lines:
        for rate, experts in product(asked.link.split(","), asked.experts.split(",")):
            cell = (experts, None if rate == "none" else rate)
            row = run_cell(store, requests, ends, cell, traces, guess_s, (given[0], given[1]))
            given = [row["read_s"], row["stop_s"]]
            lines.write(json.dumps({**row, "guess_s": guess_s, "own_guess_s": own_guess_s}) + "\n")
            lines.flush()
            for policy, predicted in row["predicted"].items():
                reached = 1 / row["took"][policy]["token_s"]
                figures = (predicted, reached, predicted / reached, row["stolen"])
                told = "\t".join(f"{figure:.2f}" for figure in figures)
                print(f"{rate}\t{experts}\t{policy}\t{told}", flush=True)
    for engine in ends.values():
        engine.close()


if __name__ == "__main__":
    main()
