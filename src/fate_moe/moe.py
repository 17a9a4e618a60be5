"""Where do the four stages meet?

One `MoELayer` per MoE layer of the model: predict, prefetch, cache (behind the lease) and compute,
in one function, `gather`. Knows no family, no file format and no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fate_moe.compute import Arriving, LowExperts, RoutedSum, light_experts
from fate_moe.predict import Predictor
from fate_moe.prefetch.mover import Mover
from fate_moe.types import Choice, Phase, Prediction

Sum = TypeVar("Sum")


class Observer(Protocol):
    """Is told what happens in every layer; changes nothing."""

    def asked(self, layer: int, gate_input: Tensor, guess: Prediction | None) -> None:
        """See a gate input [T, D] before its router does, and the guess for the next layer."""

    def sharpened(self, guess: Prediction) -> None:
        """See a second guess for a layer, before its attention."""

    def chose(self, choice: Choice) -> None:
        """See what the router chose."""


class MoELayer:
    """The routed experts of one layer, as the model calls them.

    Attributes:
        layer: its number among the MoE layers.
        num_experts: E.
        experts: what computes them.
        observer: who is told what happens; None for nobody.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        predictor: Predictor,
        mover: Mover,
        experts: RoutedSum,
        low_experts: LowExperts,
        light_share: float = 0.0,
    ) -> None:
        self.layer = layer
        self.num_experts = num_experts
        self._predictor = predictor
        self._mover = mover
        self.experts = experts
        self._low_experts = low_experts
        self._light_share = light_share
        self._guess: Prediction | None = None
        self._is_skipped = False
        self.observer: Observer | None = None

    def before_router(self, gate_input: Tensor) -> None:
        """Guess the next layer's experts from this layer's gate input, [.., D]."""
        self._guess = None
        wanted = self._mover.guess_level(_tokens(gate_input)) > 0
        if not wanted and self.observer is None:
            return  # most layers of most tokens, where guessing does not pay
        with torch.no_grad():
            x = (
                gate_input
                if gate_input.dim() == 2
                else gate_input.reshape(-1, gate_input.shape[-1])
            )
            guess = self._predictor.next(self.layer, x) if wanted else None
            self._guess = guess and self._with_low(guess, len(x))
            if self.observer is not None:
                self.observer.asked(self.layer, x, self._guess)

    def skip_layer(self) -> None:
        """Be told that this layer is computed already, before it is called: nothing to guess."""
        self._is_skipped = True

    def before_layer(self, hidden: Tensor) -> None:
        """Guess this layer's experts again from what enters it, [.., D]."""
        is_skipped, self._is_skipped = self._is_skipped, False
        # No layer before the first one names its experts.
        least = 2 if self.layer else 1
        if is_skipped or self._mover.guess_level(_tokens(hidden)) < least:
            return
        with torch.no_grad():
            x = hidden.reshape(-1, hidden.shape[-1])
            guess = self._predictor.sharpen(self.layer, x)
            self._mover.speculate(guess and self._with_low(guess, len(x)))
            if self.observer is not None and guess is not None:
                self.observer.sharpened(guess)

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
        topk_ids = topk_ids.cpu()  # here the host waits for a GPU
        return self.gather(
            topk_ids,
            topk_weights,
            lambda arriving: self.experts(x, topk_ids, topk_weights, arriving),
            beside,
        )

    def gather(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        compute: Callable[[Arriving], Sum],
        beside: Callable[[], None],
    ) -> Sum:
        """Get the experts that were chosen and compute their sum as they land.

        Args:
            topk_ids: [T, K], in the host's memory.
            compute: is handed the experts as they land, and returns what `gather` returns.
            beside: as of `forward`.
        """
        with self._mover.lease(self._choice(topk_ids, topk_weights)) as arriving:
            # After the demand: a guess only gets idle link time.
            self._mover.speculate(self._take_guess())
            beside()
            return compute(arriving)

    def _take_guess(self) -> Prediction | None:
        guess, self._guess = self._guess, None  # a step that asks for none makes none
        return guess

    def keeps_all_bits(self, count: int) -> bool:
        """Say whether a token's `count` experts are all computed from their whole records."""
        return not self._low_experts(Choice(self.layer, list(range(count)), 1))

    def _choice(self, topk_ids: Tensor, topk_weights: Tensor) -> Choice:
        choice = choice_of(self.layer, topk_ids, self.num_experts)
        low = self._low_experts(choice)
        if low:
            choice = replace(choice, low=low)
        if self._light_share and choice.phase is Phase.DECODE:
            weights = topk_weights[0].tolist()
            light = light_experts(topk_ids[0].tolist(), weights, self._light_share)
            choice = replace(choice, light=light.intersection(choice.experts) - low)
        self._predictor.learn(self.layer, choice.experts)
        if self.observer is not None:
            self.observer.chose(choice)
        return choice

    def _with_low(self, guess: Prediction, tokens: int) -> Prediction:
        low = self._low_experts(Choice(guess.layer, guess.ranked, tokens, guess.counts))
        return replace(guess, low=low) if low else guess


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def choice_of(layer: int, topk_ids: Tensor, num_experts: int) -> Choice:
    """Return the distinct experts of [T, K] ids, most tokens first, then ascending id.

    An id from E on means no expert, as in transformers.
    """
    tokens = topk_ids.shape[0]
    if tokens == 1:  # no expert twice; torch's way takes a hundred microseconds
        chosen = sorted([expert for expert in topk_ids.tolist()[0] if expert < num_experts])
        return Choice(layer, chosen, 1)
    counts = torch.bincount(topk_ids.flatten(), minlength=num_experts)[:num_experts]  # [E]
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return Choice(layer, order.tolist(), tokens, counts[order].tolist())
