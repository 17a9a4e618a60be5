"""Where do the four stages meet?

One `MoELayer` per MoE layer of the model: predict, prefetch, cache (behind the lease) and compute,
in one function. Knows no family, no file format and no policy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fate_moe.compute import RoutedSum
from fate_moe.predict import Predictor
from fate_moe.prefetch.mover import Mover
from fate_moe.types import Phase, Prediction


class MoELayer:
    """The routed experts of one layer, as the model calls them."""

    def __init__(
        self,
        layer: int,
        num_experts: int,
        predictor: Predictor,
        mover: Mover,
        experts: RoutedSum,
    ) -> None:
        self.layer = layer
        self._num_experts = num_experts
        self._predictor = predictor
        self._mover = mover
        self._experts = experts
        self._guess: Prediction | None = None

    def before_router(self, gate_input: Tensor) -> None:
        """Guess the next layer's experts from this layer's gate input, [T, D]."""
        self._guess = self._predictor.next(self.layer, gate_input)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        beside: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the routed experts' sum for tokens x [T, D]; ids and weights [T, K].

        A step of one token is booked as decode, any other as prefill.

        Args:
            beside: what else there is to compute; nothing. Done once needs are announced, so while
                threads read missing experts (small ones in decode wait: see `Mover`).
        """
        phase = Phase.PREFILL if x.shape[0] > 1 else Phase.DECODE
        with self._mover.lease(self.layer, self._needed(topk_ids), phase) as arriving:
            self._mover.speculate(self._guess)  # after the demand: a guess only gets idle link time
            beside()
            return self._experts(x, topk_ids, topk_weights, arriving)

    def _needed(self, topk_ids: Tensor) -> list[int]:
        needed = distinct(topk_ids, self._num_experts)
        self._predictor.learn(self.layer, needed)
        return needed


def distinct(topk_ids: Tensor, num_experts: int) -> list[int]:
    """Return the distinct experts of [T, K] ids, most tokens first, then ascending id.

    An id from E on means no expert, as in transformers.
    """
    if len(topk_ids) == 1:  # no expert twice; torch's way takes a hundred microseconds
        return sorted(expert for expert in topk_ids[0].tolist() if expert < num_experts)
    experts, tokens = torch.unique(topk_ids, return_counts=True)
    ranked: list[int] = experts[tokens.argsort(descending=True, stable=True)].tolist()
    return [expert for expert in ranked if expert < num_experts]
