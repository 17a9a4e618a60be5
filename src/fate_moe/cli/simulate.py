"""`fate simulate`: which cache, which allocation, which predictor would do best?"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.terminal import TerminalProgress, emit_json, guarded, show_report, show_table
from fate_moe.config import parse_size
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from fate_moe.sim.sweep import Cell, Row
    from fate_moe.sim.timeline import Link

TIME = "Time"
WHAT = "What to replay (lists, such as lru,arc: every combination)"

Traces = Annotated[
    list[Path],
    typer.Argument(
        metavar="TRACE...",
        help="Routing traces: what fate trace writes, or JSON lines (docs/traces.md).",
    ),
]
Caches = Annotated[
    str,
    typer.Option(
        "--cache", metavar="LIST", rich_help_panel=WHAT,
        help="Eviction policies: transition (the default), lru, lfu, lfru, arc (the paper's), "
        "s3fifo, guarded, and belady, which knows the future: the bound.",
    ),
]  # fmt: skip
Allocations = Annotated[
    str,
    typer.Option(
        "--allocation", metavar="LIST", rich_help_panel=WHAT,
        help="Slots of each layer: even, shallow (the paper's: the first layers whole), or global: "
        "all layers share them.",
    ),
]  # fmt: skip
Predictors = Annotated[
    str,
    typer.Option(
        "--predictor", metavar="LIST", rich_help_panel=WHAT,
        help="Whose guesses are read ahead: none, oracle (always right), or recorded (what the "
        "trace's run guessed, also by that predictor's name).",
    ),
]  # fmt: skip
Capacities = Annotated[
    str,
    typer.Option(
        "--capacity", metavar="LIST", rich_help_panel=WHAT,
        help="Share of all experts that have a slot.",
    ),
]  # fmt: skip
Leases = Annotated[
    bool | None,
    typer.Option(
        "--leases/--no-leases", rich_help_panel=WHAT,
        help="With leases, what a step asks for is locked until the step is done, and an expert "
        "that is worth less than everyone in its region is not kept: as in the engine. Without, "
        "requests come one by one and every miss evicts: as in other cache simulators. Default: "
        "with leases where a predictor guesses, else without.",
    ),
]  # fmt: skip
LinkRate = Annotated[
    str | None,
    typer.Option(
        "--link", metavar="SIZE", rich_help_panel=TIME,
        help="Bytes per second that experts are read with, such as 1.2GB. With it decoding is "
        "timed: late guesses are counted apart, and its speed is predicted. Needs --token-ms.",
    ),
]  # fmt: skip
TokenMs = Annotated[
    float | None,
    typer.Option(
        metavar="MS", min=1e-3, max=1e6, rich_help_panel=TIME,
        help="Computing a token with everything resident: 1000 / decode_tok_s of fate generate "
        "--policy resident.",
    ),
]  # fmt: skip
LatencyMs = Annotated[
    float,
    typer.Option(metavar="MS", min=0, max=1e5, rich_help_panel=TIME, help="Of each read."),
]
GuessMs = Annotated[
    float,
    typer.Option(metavar="MS", min=0, max=1e5, rich_help_panel=TIME,
                 help="Guessing for all layers of a token."),
]  # fmt: skip
ReadUs = Annotated[
    float,
    typer.Option(
        metavar="US", min=0, max=1e6, rich_help_panel=TIME,
        help="What each read takes from computing, beside its time on the link, such as 70 for "
        "32 KB; docs/traces.md says how to measure it.",
    ),
]  # fmt: skip
ExpertsMs = Annotated[
    float | None,
    typer.Option(
        metavar="MS", min=0, max=1e6, rich_help_panel=TIME,
        help="Of --token-ms, computing routed experts: what a layer can do while its own reads "
        "come in. Default: all of it.",
    ),
]  # fmt: skip
StopUs = Annotated[
    float,
    typer.Option(
        metavar="US", min=0, max=1e6, rich_help_panel=TIME,
        help="What a layer takes more than in --token-ms if it misses an expert, or is guessed "
        "for: the engine's bookkeeping, such as 60; docs/traces.md says how to measure it.",
    ),
]  # fmt: skip
ShallowLayers = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=1024, rich_help_panel=WHAT,
        help="First layers that the allocation shallow keeps whole.",
    ),
]  # fmt: skip
ExpertBytes = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Size of an expert, where the trace does not say."),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=1024, help="Replays side by side. Default: one per core."),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Receives rows.csv and plot.png."),
]
JsonOut = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print exactly one JSON object on stdout: the fields of the only combination, or all "
        "of them under `rows`.",
    ),
]


@app.command("simulate")
@guarded
def simulate(
    traces: Traces,
    cache: Caches = "transition",
    allocation: Allocations = "even",
    predictor: Predictors = "none",
    capacity: Capacities = "25%",
    leases: Leases = None,
    shallow_layers: ShallowLayers = 4,
    expert_bytes: ExpertBytes = "1MiB",
    link: LinkRate = None,
    token_ms: TokenMs = None,
    latency_ms: LatencyMs = 0.0,
    guess_ms: GuessMs = 0.0,
    read_us: ReadUs = 0.0,
    experts_ms: ExpertsMs = None,
    stop_us: StopUs = 0.0,
    jobs: Jobs = None,
    out: Out = None,
    json_out: JsonOut = False,
) -> None:
    """Replay routing traces against caches, without a model.

    A request is one distinct expert of one layer in one forward step. Without a predictor requests
    come one by one, as in other cache simulators, so that counts can be compared.

    Examples:

        fate simulate run.jsonl --cache lru --capacity 25% --json

        fate simulate *.jsonl --cache lru,arc,transition,belady --capacity 12.5%,25%,50% --out sim

        fate simulate run.trace --predictor none,oracle --allocation even,shallow,global

        fate simulate run.trace --predictor none,recorded --link 1.2GB --token-ms 48

        fate simulate run.trace --link 200MB --token-ms 17.5 --read-us 70 --stop-us 60
    """
    with TerminalProgress() as progress:
        from fate_moe.sim.sweep import run_cells

        cells = _cells(
            traces, cache, allocation, predictor, capacity, leases, shallow_layers, expert_bytes
        )
        timed = _link(link, token_ms, latency_ms, guess_ms, read_us, experts_ms, stop_us)
        cells = [replace(cell, link=timed) for cell in cells]
        if out is not None:
            _make(out)
        rows = list(run_cells(cells, jobs, progress))
    _show(rows, out, json_out)


def _cells(
    traces: list[Path],
    cache: str,
    allocation: str,
    predictor: str,
    capacity: str,
    leases: bool | None,
    shallow_layers: int,
    expert_bytes: str,
) -> list[Cell]:
    from fate_moe.sim.sweep import Cell

    size = parse_size(expert_bytes, "expert-bytes").count_bytes
    if not size:
        raise ConfigError(f"expert-bytes: {expert_bytes!r:.40}: need a size such as 4.5MiB")
    shares = [_share(text) for text in options.parts_of(capacity, "capacity")]
    chosen = product(
        traces,
        options.parts_of(cache, "cache"),
        options.parts_of(allocation, "allocation"),
        options.parts_of(predictor, "predictor"),
        shares,
    )
    return [Cell(*one, leases, shallow_layers, size) for one in chosen]


def _link(
    rate: str | None,
    token_ms: float | None,
    latency_ms: float,
    guess_ms: float,
    read_us: float,
    experts_ms: float | None,
    stop_us: float,
) -> Link | None:
    from fate_moe.sim.timeline import Link

    if rate is None and token_ms is None:
        given = {"read-us": read_us or None, "experts-ms": experts_ms, "stop-us": stop_us or None}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name}: it tells no speed without --link and --token-ms")
        return None
    if rate is None or token_ms is None:
        raise ConfigError("link: --link and --token-ms go together: one alone tells no speed")
    size = parse_size(rate.strip().removesuffix("/s"), "link").count_bytes
    if not size:
        raise ConfigError(f"link: {rate!r:.40}: need bytes per second, such as 1.2GB")
    if experts_ms is not None and experts_ms > token_ms:
        raise ConfigError(
            f"experts-ms: have {experts_ms:g}, need at most the {token_ms:g} of --token-ms"
        )
    experts_s = None if experts_ms is None else experts_ms / 1e3
    return Link(
        size, token_ms / 1e3, latency_ms / 1e3, guess_ms / 1e3, read_us / 1e6, experts_s,
        stop_us / 1e6,
    )  # fmt: skip


def _share(text: str) -> float:
    share = parse_size(text, "capacity").share
    if not share:
        raise ConfigError(f"capacity: {text!r:.40}: need a share of all experts, such as 25%")
    return share


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out}: cannot be written: {error.strerror or error}") from error


def _show(rows: list[Row], out: Path | None, json_out: bool) -> None:
    from fate_moe.sim import present

    written = [] if out is None else [out / "rows.csv", out / "plot.png"]
    if written:
        present.write_csv(rows, written[0])
        present.plot(rows, written[1])
    if json_out:
        only = asdict(rows[0]) if len(rows) == 1 else {"rows": [asdict(row) for row in rows]}
        emit_json({**only, "out": os.fspath(out)} if out else only)
        return
    show_table(*present.table(rows))
    if written:
        show_report([("written", " ".join(os.fspath(path) for path in written))])
