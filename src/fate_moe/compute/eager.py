"""What is the sum of a token's experts, computed as plainly as possible?

The oracle: every other path must equal it. Its result depends on the experts chosen and their
weights, never on the order in which they arrive: parts are kept apart and summed in ascending
expert id, in the model's dtype, which is also the order of transformers' own `eager` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Decode = Callable[[Tensor, torch.dtype], Weights]
Arriving = Iterable[Sequence[tuple[int, int, bool]]]
"""(expert, slot, low) of every distinct chosen expert, in any order, in any pieces; a low one is
computed from its INT2 head."""


class ExpertMath(Protocol):
    """One expert's feed-forward as its family defines it, given its weights."""

    def __call__(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Map tokens [n, D] to outputs [n, D]."""


class RoutedSum(Protocol):
    """The sum over each token's experts; see `EagerExperts`, which every other one follows."""

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, arriving: Arriving
    ) -> Tensor:
        """Map tokens [T, D] to outputs [T, D]."""


class EagerExperts:
    """Dequantize one expert at a time and run it on its tokens."""

    def __init__(
        self,
        decode: Decode,
        math: ExpertMath,
        slot_bytes: Callable[[int], Tensor],
        decode_low: Decode,
    ):
        """Bind what one MoE layer needs.

        Args:
            decode: turns a record, uint8 [expert_bytes], into weights of a dtype.
            math: the family's feed-forward.
            slot_bytes: gives a slot's bytes, uint8 [slot_bytes].
            decode_low: the same from the record's INT2 head.
        """
        self._decode = decode
        self._decode_low = decode_low
        self._math = math
        self._slot_bytes = slot_bytes

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        arriving: Arriving,
    ) -> Tensor:
        """Return the weighted sum over each token's experts, [T, D].

        Args:
            x: tokens, [T, D].
            topk_ids: chosen experts, [T, K] int64, distinct within a row; in the host's memory.
            topk_weights: their weights, [T, K].
            arriving: the distinct chosen experts as they land.
        """
        # place[t, k] = rank of choice k among token t's choices by ascending expert id
        place = topk_ids.argsort(dim=1).argsort(dim=1)  # [T, K]
        parts = x.new_zeros(topk_ids.shape[1], *x.shape)  # [K, T, D]
        for expert, slot, low in chain.from_iterable(arriving):
            decode = self._decode_low if low else self._decode
            weights = decode(self._slot_bytes(slot), x.dtype)
            choice, token = torch.where((topk_ids == expert).T)  # rows ordered as in transformers
            y = self._math(weights, x[token]) * topk_weights[token, choice, None]
            parts[place[token, choice], token] = y.to(x.dtype)
        out = torch.zeros_like(x)
        for part in parts:
            out += part
        return out
