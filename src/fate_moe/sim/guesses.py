"""What would have been guessed for a layer, from a trace alone?

Predictors that ask routers cannot be asked again without the model: their guesses are those that
the trace recorded. The others are the engine's own, fed with what the trace holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fate_moe.errors import ConfigError
from fate_moe.sim.trace import Trace
from fate_moe.types import Prediction


class Guesser(Protocol):
    """Says, layer by layer and step by step, in order, what is guessed."""

    def guess(self, step: int, layer: int) -> Prediction | None:
        """Return what is known to come in `layer` of `step` just before it begins, or None."""


class Nothing:
    """No guesses."""

    def __init__(self, trace: Trace) -> None:
        pass

    def guess(self, step: int, layer: int) -> Prediction | None:
        return None


class Oracle:
    """Always right: what the layer will ask for. The bound of every predictor."""

    def __init__(self, trace: Trace) -> None:
        self._steps = trace.steps

    def guess(self, step: int, layer: int) -> Prediction | None:
        experts = self._steps[step].choices[layer].experts
        return Prediction(layer, tuple(experts), len(experts))


class Recorded:
    """What the run itself guessed.

    Raises:
        ConfigError: the trace has no guesses.
    """

    def __init__(self, trace: Trace) -> None:
        if not trace.predictor:
            raise ConfigError(
                "predictor: the trace holds no guesses; record one with fate trace --predictor"
            )
        self._steps = trace.steps

    def guess(self, step: int, layer: int) -> Prediction | None:
        guesses = self._steps[step].guesses
        return None if guesses is None else guesses[layer]


GUESSERS: dict[str, Callable[[Trace], Guesser]] = {
    "none": Nothing,
    "oracle": Oracle,
    "recorded": Recorded,
}


def make_guesser(name: str, trace: Trace) -> Guesser:
    """Build the guesser called `name`; the name of the recorded predictor means its guesses.

    Raises:
        ConfigError: no such guesser, or the trace does not hold what it needs.
    """
    if name == trace.predictor:
        name = "recorded"
    if name not in GUESSERS:
        known = sorted({*GUESSERS, *filter(None, [trace.predictor])})
        raise ConfigError(f"predictor: {name!r} is none of {', '.join(known)} for this trace")
    return GUESSERS[name](trace)
