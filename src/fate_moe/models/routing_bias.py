"""What does a router choose if the experts that are in memory score higher?

Behind the router's own forward, which predictors ask, and before its block. For routers that take a
softmax and then the k largest, or what comes to the same; found by trying, not by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fate_moe.errors import ConfigError
from fate_moe.models.seam import AskableRouter, MoESite
from fate_moe.prefetch.there import There

_SCALES = 0.1, 1.0, 10.0
"""Of the random tokens that are tried."""

_REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


class RoutingBias:
    """Chooses the experts of one token anew; a forward hook of its router.

    The weights of the chosen are those that the router's own probabilities give.
    """

    def __init__(self, bias: float, is_normed: bool, there: There) -> None:
        """Bind one layer.

        Args:
            bias: added to the logits of the experts that are there.
            is_normed: the weights of the chosen sum to 1.
            there: says which are.
        """
        self._bias, self._is_normed, self._there = bias, is_normed, there

    @torch.no_grad()
    def __call__(self, router: object, args: object, output: Any) -> Any:
        """Return the output with other experts and weights; None where it stays as it is."""
        logits, weights, ids, *rest = output
        if len(logits) != 1:
            return None
        chosen = ids[0].tolist()
        # Where all of them are there, all of them rise, and no other rises further.
        if len(self._there.among(chosen)) == len(chosen):
            return None
        scores = logits[0].float()
        raised = scores.clone()
        raised[self._there.among(range(self._there.num_experts))] += self._bias
        found = raised.topk(len(chosen)).indices
        others = set(found.tolist()).difference(chosen)
        if not others:
            return None
        self._there.rerouted(len(others))
        share = scores.softmax(0)[found]
        if self._is_normed:
            share /= share.sum()
        return logits, share[None].to(weights.dtype), found[None].to(ids.dtype), *rest


def routing_biases(
    sites: Sequence[MoESite],
    there: Sequence[There],
    bias: float,
    *,
    family: str,
    hidden: int,
    dtype: torch.dtype,
) -> list[RoutingBias]:
    """Make what lets the routers of a model prefer the experts that are in memory, in decode.

    Args:
        sites: of the model, [L].
        there: which experts of each layer are, [L].
        bias: added to their logits.
        family: the model type, for the message.
        hidden, dtype: D and what the model computes in.
    Returns:
        Forward hooks of the routers, [L].
    Raises:
        ConfigError: a router takes no softmax, or chooses otherwise.
    """
    hooks = []
    for site, one in zip(sites, there, strict=True):
        router = site.askable
        is_normed = None if router is None else _norms(router, hidden, dtype)
        if router is None or is_normed is None:
            raise ConfigError(
                f"routing_bias: the routers of {family} do not take a softmax and then the k "
                "largest; leave --routing-bias out"
            )
        hooks.append(RoutingBias(bias, is_normed, one))
    return hooks


@torch.no_grad()
def _norms(router: AskableRouter, hidden: int, dtype: torch.dtype) -> bool | None:
    """Say whether the weights of the chosen sum to 1; None: they come about otherwise."""
    # Scores in few bits: the family may round once more before or after its softmax.
    tolerance = 1e-4 if dtype is torch.float32 else 1e-2
    draw = torch.Generator().manual_seed(0)
    fits = {False, True}
    for scale in _SCALES:
        x = scale * torch.randn(8, hidden, generator=draw)
        try:
            found = _try(router, x.to(dtype), tolerance)
        except _REFUSALS:
            return None
        fits &= found
    return min(fits, default=None)


def _try(router: AskableRouter, x: Tensor, tolerance: float) -> set[bool]:
    weight = next(router.module.parameters())
    x = x.to(weight.device)
    logits, weights, ids, *_ = router.module.forward(
        x[None] if router.batched else x, *router.constants
    )
    scores = logits.float()
    if logits.shape != (len(x), router.num_experts) or weights.shape != ids.shape:
        return set()
    best = scores.topk(ids.shape[1]).values
    if not torch.allclose(scores.gather(1, ids).sort(descending=True).values, best):
        return set()
    share = scores.softmax(1).gather(1, ids)
    ways = {False: share, True: share / share.sum(1, keepdim=True)}
    return {way for way, want in ways.items() if (want - weights.float()).abs().max() <= tolerance}
