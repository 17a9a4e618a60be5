"""How is a trace kept small on disk?

A safetensors file of flat arrays, so that any tool can look at it: N steps, L layers, R requests
and M guesses in all, ordered by step, then layer, then rank. `docs/traces.md` says what each is.
Invariants: a file is written whole or not at all; whatever bytes are read, the result is a sound
trace or FormatError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import FormatError
from fate_moe.sim.trace import (
    MOST_BYTES,
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_TOKENS,
    Step,
    Trace,
    no_trace,
)
from fate_moe.store.arrays import read_arrays, write_arrays
from fate_moe.store.fields import Fields
from fate_moe.store.header import load_json, read_header
from fate_moe.types import Choice, Prediction

VERSION = 1
_DIMS = {"scores": 3, "similarity": 2}  # every other array has one
_DTYPES = {
    "about": np.uint8, "tokens": np.int32, "requests": np.uint16, "request_ends": np.int64,
    "counts": np.int32, "guesses": np.uint16, "guess_ends": np.int64, "cores": np.uint16,
    "scores": np.float16, "similarity": np.float16,
}  # fmt: skip
_MOST_ABOUT = 1 << 20


def write_packed(trace: Trace, path: Path) -> None:
    """Write a trace.

    Raises:
        StoreError: the file cannot be written.
    """
    about = {
        "fate_trace": VERSION,
        "model": trace.model,
        "experts": list(trace.experts),
        "top_k": trace.top_k,
        "record_bytes": list(trace.record_bytes or ()),
        "predictor": trace.predictor or None,
    }
    choices = [choice for step in trace.steps for choice in step.choices]
    guesses = [
        guess for step in trace.steps for guess in step.guesses or [None] * len(step.choices)
    ]
    arrays: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "tokens": np.array([step.choices[0].tokens for step in trace.steps], np.int32),
        "requests": _flat([choice.experts for choice in choices], np.uint16),
        "request_ends": _ends([len(choice.experts) for choice in choices]),
        "counts": _flat([c.counts or [1] * len(c.experts) for c in choices], np.int32),
        "guesses": _flat([guess.ranked if guess else () for guess in guesses], np.uint16),
        "guess_ends": _ends([len(guess.ranked) if guess else 0 for guess in guesses]),
        "cores": np.array([guess.core if guess else 0 for guess in guesses], np.uint16),
    }
    for name in _DIMS:
        values = getattr(trace, name)
        if values is not None:
            arrays[name] = values.astype(np.float16)
    write_arrays(arrays, path)


def _flat(lists: Sequence[Sequence[int]], dtype: type) -> NDArray[Any]:
    return np.fromiter((value for one in lists for value in one), dtype)


def _ends(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)


def read_packed(path: Path) -> Trace:
    """Read what `write_packed` wrote.

    Raises:
        FormatError: the file is missing or is no sound trace.
    """
    arrays = _read_parts(path)
    trace = _read_about(arrays["about"], str(path))
    layers, steps = len(trace.experts), len(arrays["tokens"])
    where, tokens = f"{path}: ", arrays["tokens"]
    _need(bool(np.all((tokens >= 1) & (tokens <= MOST_TOKENS))), where, "tokens")
    for flat, ends in (("requests", "request_ends"), ("guesses", "guess_ends")):
        _check_parts(arrays[flat], arrays[ends], trace.experts, steps, where + flat)
    _need(len(arrays["counts"]) == len(arrays["requests"]), where, "counts")
    _need(bool(np.all(arrays["counts"] >= 1)), where, "counts")
    _need(len(arrays["cores"]) == steps * layers, where, "cores")
    shape = (steps, layers, max(trace.experts))
    for name, dims in _DIMS.items():
        _need(name not in arrays or arrays[name].shape == shape[:dims], where, name)
    return replace(
        trace,
        steps=_steps(arrays, layers, bool(trace.predictor)),
        scores=arrays.get("scores"),
        similarity=arrays.get("similarity"),
    )


def _read_parts(path: Path) -> dict[str, NDArray[Any]]:
    if "about" not in read_header(path).tensors:
        raise no_trace(path, "a safetensors file of something else")
    arrays = read_arrays(path, MOST_BYTES)
    for name, array in arrays.items():
        if _DTYPES.get(name) != array.dtype or array.ndim != _DIMS.get(name, 1):
            raise FormatError(f"{path}: {name!r:.80} of {array.dtype} is no part of a trace")
    missing = set(_DTYPES) - set(_DIMS) - set(arrays)
    if missing:
        raise FormatError(f"{path}: no trace of fate: {', '.join(sorted(missing))} missing")
    return arrays


def _read_about(data: NDArray[Any], where: str) -> Trace:
    if data.nbytes > _MOST_ABOUT:
        raise FormatError(f"{where}: about: {data.nbytes} bytes, at most {_MOST_ABOUT}")
    fields = Fields(load_json(data.tobytes(), where), where)
    fields.integer("fate_trace", VERSION, VERSION)
    experts = fields.integers("experts", MOST_LAYERS, 1, MOST_EXPERTS)
    model = fields.text("model", 200)
    top_k = fields.integer("top_k", 1, MOST_EXPERTS)
    predictor = fields.optional_text("predictor", 64)
    sizes = fields.integers("record_bytes", MOST_LAYERS, 0, 2**40)
    fields.done()
    if not experts or len(sizes) not in (0, len(experts)):
        raise FormatError(f"{where}: {len(experts)} layers, {len(sizes)} sizes of records")
    return Trace(model, experts, top_k, (), sizes or None, predictor or "")


def _need(is_sound: bool, where: str, name: str) -> None:
    if not is_sound:
        raise FormatError(f"{where}{name} does not fit the other parts of the trace")


def _check_parts(
    flat: NDArray[Any], ends: NDArray[Any], experts: Sequence[int], steps: int, where: str
) -> None:
    """Check ids by (step, layer): the parts cover all, no id is too large, none comes twice."""
    layers = len(experts)
    _need(len(ends) == steps * layers, where, "")
    lengths = np.diff(ends, prepend=0)
    last = int(ends[-1]) if len(ends) else 0
    _need(bool(np.all(lengths >= 0)) and last == len(flat), where, "")
    part = np.repeat(np.arange(len(ends)), lengths)
    _need(bool(np.all(flat < np.asarray(experts)[part % layers])), where, "")
    ids = part * MOST_EXPERTS + flat
    _need(len(np.unique(ids)) == len(ids), where, "")


def _steps(arrays: dict[str, NDArray[Any]], layers: int, has_guesses: bool) -> list[Step]:
    requests = _parts(arrays["requests"], arrays["request_ends"])
    counts = _parts(arrays["counts"], arrays["request_ends"])
    guesses = _parts(arrays["guesses"], arrays["guess_ends"])
    cores = arrays["cores"].tolist()
    steps = []
    for number, tokens in enumerate(arrays["tokens"].tolist()):
        at = [(layer, number * layers + layer) for layer in range(layers)]
        steps.append(
            Step(
                [
                    Choice(layer, requests(place), tokens, counts(place) if tokens > 1 else None)
                    for layer, place in at
                ],
                [
                    Prediction(layer, tuple(guessed), cores[place]) if guessed else None
                    for layer, place in at
                    for guessed in [guesses(place)]
                ]
                if has_guesses
                else None,
            )
        )
    return steps


def _parts(flat: NDArray[Any], ends: NDArray[Any]) -> Callable[[int], list[int]]:
    values, stops = flat.tolist(), [0, *ends.tolist()]
    return lambda place: values[stops[place] : stops[place + 1]]
