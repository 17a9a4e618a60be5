"""Which experts did the next layer take lately?

Needs no router: for families whose routers cannot be asked ahead of their turn. An expert's score
is one more for every step that chose it, and fades with every step.
Source: the least-frequently, least-recently used rule that caches use (LRFU; Lee et al., 2001),
turned into a guess.
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

FADE = 0.8  # what is left of a score after one step: the last five steps count most


class History:
    """Guess what was chosen lately, the most often chosen first."""

    sharpens = False

    def __init__(self, known: Known, config: PredictConfig) -> None:
        experts = known.experts
        self._scores = [np.zeros(count) for count in experts]
        self._last = [0] * len(experts)
        self._fewest = list(experts)  # after the first step of one token: K
        self._percentile = config.percentile
        self.width = max((self._share(count) for count in experts), default=0)

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        """Rank the experts of `layer + 1`; None for the last layer or without a past.

        As many as the layer took in its last step; for one token as many as in any step at least,
        and beyond them what a full ranking has above the percentile.
        """
        layer += 1
        if layer >= len(self._scores) or not self._last[layer]:
            return None
        scores = self._scores[layer]
        core = self._fewest[layer] if gate_input.shape[0] == 1 else self._last[layer]
        count = max(core, self._share(len(scores)) if gate_input.shape[0] == 1 else 0)
        ranked = np.argsort(-scores, kind="stable")[:count]
        return Prediction(layer, tuple(ranked[scores[ranked] > 0].tolist()), core)

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        return None

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Take in what a layer's router chose in this step; nothing is nothing to learn from."""
        if not chosen:
            return
        self._scores[layer] *= FADE
        self._scores[layer][list(chosen)] += 1
        self._last[layer] = len(chosen)
        self._fewest[layer] = min(self._fewest[layer], len(chosen))

    def _share(self, num_experts: int) -> int:  # as wide as cross_layer guesses
        return percentile_width(self._percentile, num_experts)
