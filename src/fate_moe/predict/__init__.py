"""WHICH NEXT? Predictors rank the experts that the next layer will ask for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from fate_moe.config import PredictConfig
from fate_moe.errors import ConfigError
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor


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

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        """Guess from the gate input [T, D] of `layer`, or None when there is nothing to say."""

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Hear which distinct experts the router of `layer` chose in this step."""


# name -> module path and class; each class is built from (routers [L], experts [L], PredictConfig).
PREDICTORS: dict[str, str] = {
    "cross_layer": "fate_moe.predict.cross_layer:CrossLayer",
    "history": "fate_moe.predict.history:History",
    "none": "fate_moe.predict.none:NoPrediction",
}


def make_predictor(
    config: PredictConfig, routers: Sequence[Router | None], experts: Sequence[int]
) -> Predictor:
    """Build the predictor that `config` names.

    Args:
        routers: one per MoE layer, [L]; None where the family's router cannot be asked alone.
        experts: E of each layer, [L].
    Raises:
        ConfigError: no such predictor.
    """
    if config.predictor not in PREDICTORS:
        known = ", ".join(sorted(PREDICTORS))
        raise ConfigError(f"predictor: {config.predictor!r} is none of {known}")
    module, _, cls = PREDICTORS[config.predictor].partition(":")
    predictor: Predictor = getattr(import_module(module), cls)(routers, experts, config)
    return predictor
