"""WHICH NEXT? Predictors rank the experts that the next layer will ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from fate_moe.config import PredictConfig
from fate_moe.errors import ConfigError
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.predict.ridge import FittedRouter


class Router(Protocol):
    """One layer's own router, asked outside its turn and without its hooks."""

    @property
    def num_experts(self) -> int:
        """E of the layer."""

    def __call__(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        """Map a gate input [T, D] to (scores [T, E], topk_ids [T, K] int64)."""


class Predictor(Protocol):
    """Guesses ahead of the router, and may learn from it. Never changes what is computed."""

    width: int
    """Experts guessed per decode step beyond which only the router's own top-k go; 0 = none."""

    sharpens: bool
    """Whether `sharpen` ever guesses."""

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        """Guess for the layer after `layer` from its gate input [T, D]; None: nothing to say."""

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        """Guess again for `layer` from what enters it [T, D], in place of an earlier guess.

        None leaves that one as it is.
        """

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Hear which distinct experts the router of `layer` chose in this step."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a predictor may build on.

    Attributes:
        routers: one per MoE layer, [L]; None where the family's router cannot be asked alone.
        experts: E of each layer, [L].
        early: what stands in for a layer's router when it is asked with the gate input of the layer
            before, [L]; None where nothing was fitted.
        late: the same, asked with what enters the layer before its attention, [L].
    """

    routers: Sequence[Router | None] = ()
    experts: Sequence[int] = ()
    early: Sequence[FittedRouter | None] = ()
    late: Sequence[FittedRouter | None] = ()


# name -> module path and class; each class is built from (Known, PredictConfig).
PREDICTORS: dict[str, str] = {
    "cross_layer": "fate_moe.predict.cross_layer:CrossLayer",
    "history": "fate_moe.predict.history:History",
    "none": "fate_moe.predict.none:NoPrediction",
    "path": "fate_moe.predict.path:Path",
    "ridge": "fate_moe.predict.ridge:Ridge",
}


def percentile_width(percentile: float, num_experts: int) -> int:
    """Return how many of E scores lie at or above the linearly interpolated percentile."""
    return num_experts - math.ceil(percentile / 100 * (num_experts - 1))


def make_predictor(config: PredictConfig, known: Known) -> Predictor:
    """Build the predictor that `config` names.

    Raises:
        ConfigError: no such predictor.
    """
    if config.predictor not in PREDICTORS:
        names = ", ".join(sorted(PREDICTORS))
        raise ConfigError(f"predictor: {config.predictor!r} is none of {names}")
    module, _, cls = PREDICTORS[config.predictor].partition(":")
    predictor: Predictor = getattr(import_module(module), cls)(known, config)
    return predictor
