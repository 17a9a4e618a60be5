"""What would the next router say, as far as a linear map can tell ahead of it?

Two maps per layer, fitted in closed form on a text (`fate calibrate`): an early one from the gate
input of the layer before, which replaces the paper's question to the next router, and a late one
from what enters the layer before its attention: later, but surer. The late guess takes the early
one's place: reads that it does not confirm and that have not begun are dropped. A layer without
maps is asked as the paper does, and guessed as wide as with them.
Ours; the maps are ridge regressions on the router's scores. Measured in `docs/experiments.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from fate_moe import native
from fate_moe.config import PredictConfig
from fate_moe.predict import percentile_width
from fate_moe.predict.cross_layer import CrossLayer
from fate_moe.types import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from fate_moe.predict import Known, Router

NORM_EPS = 1e-6
_SMALL_WEIGHTS = 1 << 20  # more are worth several cores
WIDER = 1.5  # guesses per expert the router takes, where the percentile gives fewer


@dataclass(frozen=True, slots=True)
class FittedRouter:
    """A linear map in a router's place. See `predict.Router`.

    Attributes:
        weight: [E, D].
        bias: [E].
        top_k: K.
        is_normed: its input is divided by its root mean square first.
    """

    weight: Tensor
    bias: Tensor
    top_k: int
    is_normed: bool
    _native: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.weight, self.bias
        fits = self.bias.shape == (self.num_experts,) and self.weight.numel() <= _SMALL_WEIGHTS
        if native.is_available() and fits and all(_is_plain(part) for part in parts):
            addresses = (part.data_ptr() for part in parts)
            eps = NORM_EPS if self.is_normed else -1.0
            found = native.core().LinearMap(*addresses, *self.weight.shape, eps)
            object.__setattr__(self, "_native", found)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.weight.shape[0])

    def scores(self, x: Tensor) -> Tensor:
        """Map inputs [T, D] to scores [T, E]."""
        x = x.float()
        if self.is_normed:
            x = F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addmm(self.bias, x, self.weight.T)

    def highest(self, x: Tensor, count: int) -> list[int]:
        """Return the experts with the highest scores for one input [1, D], highest first."""
        if self._native is not None and _is_plain(x) and x.shape[-1] == self.weight.shape[1]:
            found: list[int] = self._native.highest(x.data_ptr(), count)
            return found
        ranked: list[int] = self.scores(x)[0].topk(count).indices.tolist()
        return ranked

    def __call__(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(gate_input)
        return scores, scores.topk(self.top_k, dim=-1).indices


def _is_plain(x: Tensor) -> bool:
    """Say whether the native core can read a tensor where it lies."""
    return x.dtype is torch.float32 and x.is_contiguous() and x.is_cpu


def guess_width(top_k: int, num_experts: int, percentile: float) -> int:
    """Return how many experts are guessed for one token."""
    wider = min(num_experts, math.ceil(WIDER * top_k))
    return max(percentile_width(percentile, num_experts), wider)


class Ridge(CrossLayer):
    """Ask the fitted maps; where there are none, the next layer's own router."""

    def __init__(self, known: Known, config: PredictConfig) -> None:
        early = known.early or (None,) * len(known.routers)
        routers: list[Router | None] = [
            one or own for one, own in zip(early, known.routers, strict=True)
        ]
        super().__init__(replace(known, routers=routers), config)
        self._late = tuple(known.late)
        self.sharpens = any(one is not None for one in self._late)
        fitted = [one for one in (*early, *self._late) if one is not None]
        widths = (self._width(one.top_k, one.num_experts) for one in fitted)
        self.width = max(self.width, *widths, 0)

    def sharpen(self, layer: int, hidden: Tensor) -> Prediction | None:
        """Guess for `layer` from what enters it; None where nothing was fitted."""
        router = self._late[layer] if self._late else None
        return None if router is None else self._ask(router, layer, hidden)

    def _ask(self, router: Router, layer: int, x: Tensor) -> Prediction:
        if len(x) > 1 or not isinstance(router, FittedRouter):
            return super()._ask(router, layer, x)
        # A map's scores rank alone: one search for the highest does for both widths.
        width = self._width(router.top_k, router.num_experts)
        return Prediction(layer, tuple(router.highest(x, width)), router.top_k)

    def _width(self, core: int, num_experts: int) -> int:
        return guess_width(core, num_experts, self._percentile)
