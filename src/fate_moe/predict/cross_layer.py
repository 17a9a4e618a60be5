"""What would the next layer's router say to this layer's gate input?

The paper's predictor: adjacent gate inputs are similar, so router l+1 asked with the gate input of
layer l already names most of the experts of layer l+1.
Source: Fate (arXiv 2502.12224), cross-layer gate. Width: the router's top-k, and in decode also
every expert scored at or above the 75th percentile; in prefill the union over the tokens of the
top-k, most popular first (FFFzy/Fate_open, the decoder layers' prefill path). A layer whose router
cannot be asked ahead of its turn is guessed from its own history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fate_moe.config import PredictConfig
from fate_moe.predict import percentile_width
from fate_moe.predict.history import History
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.predict import Known, Router


class CrossLayer:
    """Ask router l+1 about the gate input of layer l."""

    sharpens = False

    def __init__(self, known: Known, config: PredictConfig) -> None:
        self._routers = tuple(known.routers)
        self._percentile = config.percentile
        self._history = History(known, config) if None in self._routers else None
        self.width = max((self._above_percentile(count) for count in known.experts), default=0)

    def next(self, layer: int, gate_input: Tensor) -> Prediction | None:
        """Rank the experts of `layer + 1`; None for the last layer."""
        if layer + 1 >= len(self._routers):
            return None
        router = self._routers[layer + 1]
        if router is None:
            return self._history.next(layer, gate_input) if self._history else None
        return self._ask(router, layer + 1, gate_input)

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        """Leave the guess as it is."""
        return None

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Hear what a router chose; only layers that cannot be asked need it."""
        if self._history is not None and self._routers[layer] is None:
            self._history.learn(layer, chosen)

    def _ask(self, router: Router, layer: int, x: Tensor) -> Prediction:
        scores, topk_ids = router(x)  # [T, E], [T, K]
        if topk_ids.shape[0] == 1:
            return self._one_token(layer, scores[0], topk_ids[0], router.num_experts)
        votes = torch.bincount(topk_ids.flatten().cpu(), minlength=router.num_experts)  # [E]
        ranked = votes.argsort(descending=True, stable=True)
        core = int((votes > 0).sum())
        named = ranked[:core]
        return Prediction(layer, tuple(named.tolist()), core, tuple(votes[named].tolist()))

    def _one_token(self, layer: int, scores: Tensor, ids: Tensor, num_experts: int) -> Prediction:
        core: list[int] = ids.tolist()
        # The router's own choice comes first: it may follow rules (groups, correction biases)
        # that the bare scores do not show.
        width = self._width(len(core), num_experts)
        by_score = scores.topk(width).indices.tolist()
        chosen = set(core)
        extra = [e for e in by_score if e not in chosen]
        return Prediction(layer, (*core, *extra), len(core))

    def _width(self, core: int, num_experts: int) -> int:
        return self._above_percentile(num_experts)

    def _above_percentile(self, num_experts: int) -> int:
        return percentile_width(self._percentile, num_experts)
