"""Which experts did the most similar request take in the next layer?

The rival of asking routers: a request leaves a matrix behind, how often each expert of each layer
was chosen. While a new one runs, the matrix so far is compared with those of earlier requests, and
the nearest one's row of the next layer is the guess. With no earlier request the row of this one
is. Needs no router and no gate input.
Source: MoE-Infinity (arXiv 2401.14361), expert activation matrices; the baseline "expert activation
path" of Fate (arXiv 2502.12224). Differs: earlier requests are the last ones, not centres of
clusters, and one layer ahead is guessed, as by every predictor here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fate_moe.config import PredictConfig
from fate_moe.predict import percentile_width
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.predict import Known

KEPT = 128  # earlier requests


class Path:
    """Guess what the nearest earlier request took."""

    sharpens = False

    def __init__(self, known: Known, config: PredictConfig) -> None:
        self._experts = tuple(known.experts)
        self._percentile = config.percentile
        widest = max(self._experts, default=0)
        self._shape = (len(self._experts), widest)
        self.width = max((self._share(count) for count in self._experts), default=0)
        self._mine = np.zeros(self._shape)
        self._earlier = np.zeros((0, *self._shape))  # each row of length 1, or 0
        self._likeness = np.zeros(0)  # of each earlier request, over the layers of this step so far
        self._decoded = False
        self._most = list(self._experts)  # after the first step of one token: K

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        """Rank the experts of `layer + 1`; None for the last layer or without a past."""
        tokens = int(gate_input.shape[0])
        if layer == 0:
            self._begin_step(tokens)
        layer += 1
        if layer >= len(self._experts):
            return None
        row = self._mine[layer]
        if len(self._likeness):
            row = self._earlier[int(self._likeness.argmax()), layer]
        core = self._most[layer]
        count = core if tokens > 1 else max(core, self._share(self._experts[layer]))
        ranked = np.argsort(-row[: self._experts[layer]], kind="stable")[:count]
        chosen = ranked[row[ranked] > 0]
        if not len(chosen):
            return None
        return Prediction(layer, tuple(chosen.tolist()), min(core, len(chosen)))

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        return None

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Add what a layer's router chose in this step, and compare."""
        if not chosen:
            return
        self._most[layer] = min(self._most[layer], len(chosen))
        row = self._mine[layer]
        row[list(chosen)] += 1
        if len(self._earlier):
            self._likeness += self._earlier[:, layer] @ (row / np.sqrt(row @ row))

    def _begin_step(self, tokens: int) -> None:
        if tokens > 1 and self._decoded:  # a prompt after an answer: another request
            length = np.sqrt((self._mine**2).sum(axis=1, keepdims=True))
            done = self._mine / np.maximum(length, 1e-9)
            self._earlier = np.concatenate([self._earlier, done[None]])[-KEPT:]
            self._mine = np.zeros(self._shape)
        self._decoded = tokens == 1
        self._likeness = np.zeros(len(self._earlier))

    def _share(self, num_experts: int) -> int:  # as wide as cross_layer guesses
        return percentile_width(self._percentile, num_experts)
