"""How are rivals measured so that a busy machine is unfair to none?

In rounds: every round runs each cell with each rival once, one after the other, so what else goes
on falls on all. Each run is a process of its own; under a memory limit it finds none of its files
in memory. Every run is written down at once, one JSON object a line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from fate_moe.bench.ceilings import decode_ceiling, prefill_ceiling
from fate_moe.bench.cgroup import DiskRate
from fate_moe.bench.machine import Card
from fate_moe.bench.process import Done, forget_files, run_alone
from fate_moe.bench.readahead import reading_ahead
from fate_moe.bench.rivals.rival import STAGES, Cell, Reading, Rival, Setting, Stage
from fate_moe.errors import ConfigError
from fate_moe.types import Progress

OK, LATE, NO_MEMORY, FAILED = "ok", "did not finish", "out of memory", "failed"
_WHY_CHARS = 300


@dataclass(frozen=True, slots=True)
class Form:
    """What is measured.

    Attributes:
        limits: bytes for the whole process; None: no limit.
        rounds: runs of each cell.
        prompt_tokens, new_tokens: read in prefill, written in decode.
        seconds: for each run, loading included.
        thorough: every known setting of the rivals.
        readahead_kib: tried under a limit for programs that map files; empty: the machine's own.
    """

    limits: tuple[int | None, ...]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    thorough: bool
    readahead_kib: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    """Who is measured, and where.

    Attributes:
        rivals: in the order in which they run; Fate first, whose counts give the ceilings.
        card: the machine.
        disk: its folder in /sys; None: readahead is left alone.
        read_bytes: of weights that a token reads.
        threads: computing threads of every rival.
        rate: what the disk is held to for every rival; None: it is not.
    """

    rivals: Sequence[Rival]
    card: Card
    disk: Path | None
    read_bytes: int
    threads: int
    rate: DiskRate | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One run.

    Attributes:
        state: ok, did not finish, out of memory or failed; `why` says more.
        tok_s: of the last pass; None unless ok.
        ceiling_tok_s: what the machine allows at most, None where unknown; `share` of it reached.
        moved_bytes: of experts a token, from Fate's counts: what the ceiling was computed from.
        wall_s, read_bytes, peak_bytes: of the whole process, as in `Done`.
        load_average: before it ran.
        details: what the program counts itself.
    """

    round: int
    rival: str
    setting: str
    readahead_kib: int | None
    limit_bytes: int | None
    stage: Stage
    tokens: int
    state: str
    why: str
    tok_s: float | None
    ceiling_tok_s: float | None
    share: float | None
    moved_bytes: float | None
    wall_s: float
    read_bytes: int
    peak_bytes: int | None
    load_average: float
    details: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Run:
    rival: Rival
    setting: Setting
    cell: Cell
    readahead_kib: int | None


def run_rounds(
    bench: Bench, form: Form, out: IO[str], on_row: Callable[[Row], None], progress: Progress
) -> list[Row]:
    """Measure everything, round by round.

    What was too slow or too large once is not tried again.

    Args:
        out: receives a line for each run.
        on_row: told about each run when it is done.
    Raises:
        ConfigError: no memory group can be made, or readahead cannot be set.
    """
    rows: list[Row] = []
    runs = list(_runs(bench, form))
    given_up: set[int] = set()
    moved: dict[tuple[int | None, Stage], float] = {}
    total = len(runs) * form.rounds
    for done in range(total):
        number, place = divmod(done, len(runs))
        run = runs[place]
        progress(f"{run.rival.name}: {run.cell.stage}", done, total)
        if place in given_up:
            continue
        row = _measure(bench, form, run, number + 1, moved)
        if row.state != OK:
            given_up.add(place)
        rows.append(row)
        out.write(json.dumps(asdict(row)) + "\n")
        out.flush()
        on_row(row)
    return rows


def _runs(bench: Bench, form: Form) -> Iterator[_Run]:
    """List the runs of a round, rivals side by side in each cell."""
    for limit in form.limits:
        for stage in STAGES:
            tokens = form.prompt_tokens if stage == "prefill" else form.new_tokens
            # A long prompt under a limit reads every expert whatever was in memory before.
            passes = 1 if stage == "prefill" and limit is not None else 2
            cell = Cell(stage, tokens, passes, limit, bench.threads)
            for rival in bench.rivals:
                tunes = limit is not None and rival.is_mapping and bench.disk is not None
                for setting in rival.settings(cell, form.thorough):
                    for kib in form.readahead_kib if tunes and form.readahead_kib else (None,):
                        yield _Run(rival, setting, cell, kib)


def _measure(
    bench: Bench,
    form: Form,
    run: _Run,
    number: int,
    moved: dict[tuple[int | None, Stage], float],
) -> Row:
    cell, key = run.cell, (run.cell.limit_bytes, run.cell.stage)
    load = os.getloadavg()[0]
    if cell.limit_bytes is not None:
        forget_files(run.rival.files)
    with reading_ahead(bench.disk, run.readahead_kib):
        done = run_alone(run.setting.command, cell.limit_bytes, form.seconds, bench.rate)
    state, why, reading = _judge(run.rival, cell, done)
    if reading is not None and "bytes_demand" in reading.details:
        moved[key] = _moved_bytes(reading)
    ceiling = _ceiling(bench, cell, moved.get(key, 0.0 if cell.limit_bytes is None else None))
    rate = reading.tok_s if reading else None
    return Row(
        round=number,
        rival=run.rival.name,
        setting=run.setting.name,
        readahead_kib=run.readahead_kib,
        limit_bytes=cell.limit_bytes,
        stage=cell.stage,
        tokens=cell.tokens,
        state=state,
        why=why,
        tok_s=rate,
        ceiling_tok_s=ceiling,
        share=rate / ceiling if rate and ceiling else None,
        moved_bytes=moved.get(key),
        wall_s=done.wall_s,
        read_bytes=done.read_bytes,
        peak_bytes=done.peak_bytes,
        load_average=load,
        details=dict(reading.details) if reading else {},
    )


def _judge(rival: Rival, cell: Cell, done: Done) -> tuple[str, str, Reading | None]:
    """Say how a run ended, and what it printed if it ended well."""
    if done.is_late:
        return LATE, f"ended after {done.wall_s:.0f} s", None
    if done.code == -9 and cell.limit_bytes is not None:
        return NO_MEMORY, "ended by the system: it needs more than its limit", None
    if done.code != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return FAILED, f"exit code {done.code}: {''.join(last)[:_WHY_CHARS]}", None
    try:
        return OK, "", rival.read(done.stdout)
    except ConfigError as error:
        return FAILED, str(error)[:_WHY_CHARS], None


def _moved_bytes(reading: Reading) -> float:
    """Bytes of experts that came from disk for a token and were used."""
    counts = reading.details
    fields = ("bytes_demand", "bytes_speculated", "bytes_wasted", "counted_tokens")
    demanded, guessed, wasted, tokens = (int(str(counts[name])) for name in fields)
    return (demanded + guessed - wasted) / tokens


def _ceiling(bench: Bench, cell: Cell, moved_bytes: float | None) -> float | None:
    if moved_bytes is None:
        return None
    if cell.stage == "decode":
        return decode_ceiling(bench.card, bench.read_bytes, moved_bytes)
    return prefill_ceiling(bench.card, cell.tokens, moved_bytes * cell.tokens)
