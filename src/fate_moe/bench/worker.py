"""How fast is Fate itself, alone in a process? `python -m fate_moe.bench.worker JOB`

Random tokens are read, or are written whatever the model says: llama-bench does the same, and a
model with random weights left to itself repeats a token, whose experts are then all in memory.
Prints one line of JSON; the last pass counts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fate_moe.config import Config, make_config
from fate_moe.engine.build import build
from fate_moe.engine.demands import PREFILL_CHUNK_TOKENS
from fate_moe.engine.handle import Engine
from fate_moe.errors import BudgetError, ConfigError, FateError
from fate_moe.models.kv_cache import new_cache

RAM = "95%"  # of the limit, or of what is available
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
    """

    store: str
    stage: str
    tokens: int
    passes: int
    threads: int
    is_limited: bool
    ram: str = RAM


def measure(job: Job) -> dict[str, object]:
    """Open the store and run the job.

    Raises:
        FateError: as `build`.
    """
    torch.set_num_threads(job.threads)
    began_s = time.perf_counter()
    engine = _open(job)
    loaded_s = time.perf_counter() - began_s
    ids = torch.Generator().manual_seed(0)
    run = {"prefill": _prefill, "decode": _decode}.get(job.stage)
    if run is None:
        raise ConfigError(f"stage: {job.stage!r:.40} is none of prefill, decode")
    try:
        totals, steps = [], [0.0]
        for _ in range(job.passes):
            engine.reset()
            steps = run(engine, job.tokens, ids)
            totals.append(sum(steps))
        report = engine.report()
    finally:
        engine.close()
    return {
        "tok_s": job.tokens / totals[-1],
        "median_tok_s": 1 / statistics.median(steps) if job.stage == "decode" else None,
        "passes_s": totals,
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
    return build(Path(job.store), config("fate"))


@torch.no_grad()
def _prefill(engine: Engine, tokens: int, ids: torch.Generator) -> list[float]:
    """Read a prompt; seconds of each chunk."""
    model: Any = engine.model
    prompt = _random_ids(model, tokens, ids)
    cache, steps = new_cache(model), []
    size = tokens if cache is None else PREFILL_CHUNK_TOKENS
    for start in range(0, tokens, size):
        began_s = time.perf_counter()
        model(
            input_ids=prompt[:, start : start + size], past_key_values=cache,
            use_cache=cache is not None, logits_to_keep=1,
        )  # fmt: skip
        steps.append(time.perf_counter() - began_s)
    return steps


def _decode(engine: Engine, tokens: int, ids: torch.Generator) -> list[float]:
    """Write tokens after a prompt of one; seconds of each step."""
    model: Any = engine.model
    model.generation_config.eos_token_id = None  # a random token may be one
    forced, clock = _Forced(_random_ids(model, tokens + 1, ids)[0].tolist()), _Clock()
    prompt = _random_ids(model, 1, ids)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=new_cache(model),
        max_new_tokens=tokens + 1,
        do_sample=False,
        logits_processor=[forced],
        streamer=clock,
    )
    # The first token is the prompt's, and whatever `generate` prepares.
    times = clock.times_s[1:]
    return [after - before for before, after in pairwise(times)]


def _random_ids(model: Any, count: int, ids: torch.Generator) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (1, count), generator=ids)


class _Forced:
    """A logits processor that makes given ids the likeliest, one a step."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, next(self._ids)] = float("inf")
        return scores


class _Clock:
    """A streamer that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


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
