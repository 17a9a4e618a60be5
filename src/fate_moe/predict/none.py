"""Guess nothing: load on demand, the naive twin of every predictor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fate_moe.config import PredictConfig
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.predict import Known


class NoPrediction:
    """The predictor of the policies `demand` and `resident`."""

    width = 0
    sharpens = False

    def __init__(self, known: Known, config: PredictConfig) -> None:
        pass

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        return None

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        return None

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        pass
