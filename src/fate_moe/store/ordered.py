"""How are pieces of work done side by side and handed on in order, few at a time?

Threads, because the work (torch's operators, reading, hashing) lets go of the interpreter's lock.
Invariants: what is handed on does not depend on the number of threads; never more than
`jobs` pieces are in work, and never more than `jobs + 1` are begun and not yet handed on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from fate_moe.errors import ConfigError

MAX_JOBS = 256
_JOBS_BYTES = 1 << 30
_WEIGHT_BYTES = 8  # of an expert in work at most: its tensors, joined ones, codes, the record
T = TypeVar("T")
R = TypeVar("R")


def in_order(make: Callable[[T], R], items: Iterable[T], jobs: int) -> Generator[R, None, None]:
    """Yield `make(item)` for every item, in the order of the items.

    Close it when you stop early. An error, an interrupt, or closing drops what is not begun and
    waits for what is in work, so that nothing of it runs on when the caller goes on.

    Args:
        make: may run in any of the threads.
        items: asked for from the caller's thread only, and never more than `jobs + 1` ahead.
        jobs: threads, 1 to 256.
    Raises:
        Exception: what `make` raised for the first item that failed, after all items before it.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(jobs, thread_name_prefix="fate-convert") as pool:
        window = deque(pool.submit(make, item) for item in islice(waiting, jobs + 1))
        try:
            while window:
                yield window.popleft().result()
                window.extend(pool.submit(make, item) for item in islice(waiting, 1))
        finally:
            for future in window:
                future.cancel()


def check_jobs(jobs: int | None) -> None:
    """Check a number of jobs; None stands for the default.

    Raises:
        ConfigError: it is not in 1 to 256.
    """
    if jobs is not None and not 1 <= jobs <= MAX_JOBS:
        raise ConfigError(f"jobs: have {jobs}, need 1 to {MAX_JOBS}")


def default_jobs(expert_weights: int) -> int:
    """Count the experts to convert side by side: one per core, together within 1 GiB.

    Args:
        expert_weights: weights of the largest expert.
    """
    return max(1, min(_usable_cores(), MAX_JOBS, _JOBS_BYTES // (_WEIGHT_BYTES * expert_weights)))


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
