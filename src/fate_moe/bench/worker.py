"""How fast is Fate itself, alone in a process? `python -m fate_moe.bench.worker JOB`

Prints one line of JSON; the last pass counts (see `passes`).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fate_moe import native
from fate_moe.bench.passes import time_pass
from fate_moe.config import DEFAULT_POLICY, Config, make_config
from fate_moe.engine.build import build
from fate_moe.engine.handle import Engine
from fate_moe.errors import BudgetError, FateError

RAM = "98%"  # of the limit, or of what is available: the plan is an upper bound
_COUNTS = (
    "mode", "requests", "hits", "late", "misses", "bytes_demand", "bytes_speculated",
    "bytes_wasted", "stall_s", "experts_capacity", "experts_total", "peak_rss_bytes",
    "planned_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure.

    Attributes:
        store: folder of the store.
        stage, tokens, passes, threads: as in `Cell`.
        is_limited: the process has a memory limit, so not everything can be resident.
        ram: memory to plan with.
        instructions: that the native core computes with; empty: the widest there are.
    """

    store: str
    stage: str
    tokens: int
    passes: int
    threads: int
    is_limited: bool
    ram: str = RAM
    instructions: str = ""


def measure(job: Job) -> dict[str, object]:
    """Open the store and run the job.

    Raises:
        FateError: as `build`, and as `use_instructions`.
    """
    if job.instructions:
        native.use_instructions(job.instructions)
    torch.set_num_threads(job.threads)
    began_s = time.perf_counter()
    engine = _open(job)
    loaded_s = time.perf_counter() - began_s
    ids = torch.Generator().manual_seed(0)
    try:
        totals, steps = [], [0.0]
        for _ in range(job.passes):
            engine.reset()
            steps = time_pass(engine.model, job.stage, job.tokens, ids, engine.chunk_tokens)
            totals.append(sum(steps))
        report = engine.report()
    finally:
        engine.close()
    return {
        "tok_s": job.tokens / totals[-1],
        "median_tok_s": 1 / statistics.median(steps) if job.stage == "decode" else None,
        "passes_s": totals,
        # The counts below are of the whole pass, the prompt of one token before writing included.
        "counted_tokens": job.tokens + (job.stage == "decode"),
        "loaded_s": loaded_s,
        **{name: getattr(report, name) for name in _COUNTS},
    }


def _open(job: Job) -> Engine:
    def config(policy: str) -> Config:
        return make_config(
            policy, ram=job.ram, context_tokens=max(64, job.tokens + 8), threads=job.threads
        )

    if not job.is_limited:
        try:
            return build(Path(job.store), config("resident"))
        except BudgetError:  # larger than this machine: the default policy's case
            pass
    return build(Path(job.store), config(DEFAULT_POLICY))


def _main() -> int:
    try:
        found = measure(Job(**json.loads(sys.argv[1])))
    except FateError as error:
        sys.stderr.write(f"fate: {error}\n")
        return 2
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
