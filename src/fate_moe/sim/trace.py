"""What did the routers of a run choose, and what was guessed?

A trace holds, for every forward step and MoE layer, the distinct experts that were asked for. Two
forms are read; `docs/traces.md` describes both:
    JSON lines   a line of metadata, then one line a step; what other projects publish
    safetensors  what `fate trace` writes: compact, and with the guesses beside the requests
Input is not trusted: whatever the bytes are, the result is a sound trace or FormatError.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import FormatError
from fate_moe.store.fields import Fields
from fate_moe.telemetry import Counts
from fate_moe.types import Choice, Phase, Prediction

MOST_BYTES = 2**31
MOST_LAYERS = 1024
MOST_EXPERTS = 65536
MOST_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class Step:
    """One forward step.

    Attributes:
        choices: of each layer, [L].
        guesses: what was guessed for each layer, [L]; None = no guesses were recorded.
    """

    choices: Sequence[Choice]
    guesses: Sequence[Prediction | None] | None = None

    @property
    def phase(self) -> Phase:
        """A step of one token is decode, any other prefill, as in the engine."""
        return self.choices[0].phase


@dataclass(frozen=True, slots=True)
class Trace:
    """A run.

    Attributes:
        model: whose routers.
        experts: E of each MoE layer, [L].
        top_k: K; the most where layers differ.
        steps: in order; requests (one expert of one layer in one step) are counted in them.
        record_bytes: of each layer, [L]; None where unknown.
        predictor: whose guesses were recorded; "" where none were.
        scores: of the router for every expert, the mean over the tokens, [N, L, E]; None where not
            recorded, and 0 beyond the experts that a layer has.
        similarity: cosine of a layer's gate input and that of the layer before, the mean over the
            tokens, [N, L]; None where not recorded.
    """

    model: str
    experts: tuple[int, ...]
    top_k: int
    steps: Sequence[Step]
    record_bytes: tuple[int, ...] | None = None
    predictor: str = ""
    scores: NDArray[np.float16] | None = None
    similarity: NDArray[np.float16] | None = None
    requests: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        total = sum(len(choice.experts) for step in self.steps for choice in step.choices)
        object.__setattr__(self, "requests", total)


def read_trace(path: Path) -> Trace:
    """Read a trace of either form.

    Raises:
        FormatError: the file is missing, or is no sound trace.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(9)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > MOST_BYTES:
        raise FormatError(f"{path}: {size} bytes; a trace has at most {MOST_BYTES}")
    if first.startswith(b"{"):
        return _read_lines(path)
    if first[8:] != b"{":  # where the header of any safetensors file begins
        raise no_trace(path, "neither JSON lines nor safetensors")
    from fate_moe.sim.trace_file import read_packed

    return read_packed(path)


def no_trace(path: Path, why: str) -> FormatError:
    """Return the error of a file that is something else, with where traces come from."""
    return FormatError(
        f"{path}: no trace of what a model's routers chose ({why}); fate trace -p TEXT -o FILE "
        "makes one"
    )


def _read_lines(path: Path) -> Trace:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not _is_metadata(lines[0]):
            raise no_trace(path, "line 1 is no JSON object with num_layers")
        first, *rest = map(json.loads, lines)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON lines: {error}") from error
    fields = Fields(first, f"{path}: line 1")
    layers = fields.integer("num_layers", 1, MOST_LAYERS)
    experts = fields.integer("num_experts", 1, MOST_EXPERTS)
    top_k = fields.integer("top_k", 1, experts)
    model = fields.text("model", 200)
    steps = [
        _read_line(row, layers, experts, f"{path}: line {number}")
        for number, row in enumerate(rest, start=2)
    ]
    return Trace(model, (experts,) * layers, top_k, steps)


def _is_metadata(line: str) -> bool:
    try:
        return "num_layers" in json.loads(line)
    except (ValueError, RecursionError):
        return False


def _read_line(row: object, layers: int, experts: int, where: str) -> Step:
    chosen = row.get("layers") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(chosen, list) or len(chosen) != layers:
        raise FormatError(f"{where}: need 'layers', a list of {layers} lists of expert ids")
    for ids in chosen:
        check_ids(ids, experts, where)
    tokens = row.get("tokens", 1)
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise FormatError(f"{where}: 'tokens' is {tokens!r:.40}, need 1 to {MOST_TOKENS}")
    return Step([Choice(layer, ids, tokens) for layer, ids in enumerate(chosen)])


def check_ids(ids: object, experts: int, where: str) -> None:
    """Check that something is a list of distinct expert ids.

    Raises:
        FormatError: it is not.
    """
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < experts for i in ids):
        raise FormatError(f"{where}: {ids!r:.80} is no list of expert ids below {experts}")
    if len(set(ids)) != len(ids):
        raise FormatError(f"{where}: {ids!r:.80} names an expert twice")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a trace holds, in a few numbers; `recall` as in the engine's report, of all layers."""

    model: str
    layers: int
    steps: int
    decode_steps: int
    requests: int
    predictor: str
    recall: float | None
    recall_top_k: float | None


def summarize(trace: Trace) -> Summary:
    """Count what is in a trace."""
    counts = Counts()
    for step in trace.steps:
        for choice, guess in zip(step.choices, step.guesses or (), strict=False):
            if guess is not None:
                counts.add_guess(guess, choice.experts)
    return Summary(
        model=trace.model,
        layers=len(trace.experts),
        steps=len(trace.steps),
        decode_steps=sum(step.phase is Phase.DECODE for step in trace.steps),
        requests=trace.requests,
        predictor=trace.predictor,
        recall=counts.recall,
        recall_top_k=counts.recall_top_k,
    )
