"""How loud is each neuron of a gated expert, and how is its rounding error kept down for it?

A gated expert computes `down @ (act(gate @ x) * (up @ x))`, which is linear in `up`: neuron j may
be made b_j times quieter in `up` and its column of `down` b_j times larger, and the expert is the
same. Rounding is not: in a group of a row of `down` every weight has the same error, and that error
is multiplied by its neuron. With loud neurons' columns made larger, their error falls against their
weight, and quiet neurons, whose errors hardly count, pay for it.

How loud a neuron will be is estimated from its weights alone: b_j = sqrt(|gate_j| |up_j|), lengths
of the two rows. Some models have single neurons that are a thousand times louder than the rest; for
these the estimate takes most of the error away.

Source: scaling before rounding is that of AWQ (Lin et al., arXiv 2306.00978), from measured
activations, and of cross-layer equalization (Nagel et al., arXiv 1906.04721), from weights; the
estimate is ours (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

BALANCED = ("gate_up_proj", "down_proj")  # the only parameters that an expert may have
SPREAD = 64.0  # a neuron's scale differs from the middle one by at most so much: fp16 must hold it


def balance(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Scale an expert's neurons for rounding; what it computes stays the same.

    Args:
        gate_up: [2F, D], the rows of gate, then those of up.
        down: [D, F].
    Returns:
        Both in float32, gate's rows unchanged.
    """
    gate_up = gate_up.to(torch.float32, copy=True)
    scale = loudness(gate_up)
    gate_up[len(scale) :] /= scale[:, None]
    return gate_up, down.to(torch.float32, copy=True).mul_(scale)


def loudness(gate_up: Tensor) -> Tensor:
    """Estimate how loud each neuron is against its expert's middle one; 1 where unknown.

    Args:
        gate_up: [..., 2F, D], the rows of gate, then those of up.
    Returns:
        [..., F] float32.
    """
    gate, up = torch.linalg.vector_norm(gate_up, dim=-1).chunk(2, -1)
    product = (gate * up).double().sqrt()
    is_known = product.isfinite() & (product > 0)
    logs = torch.where(is_known, product, 1.0).log()
    middle = (logs.sum(-1, keepdim=True) / is_known.sum(-1, keepdim=True)).exp()
    relative = product / middle
    relative = torch.where(relative.isfinite() & (relative > 0), relative, 1.0)
    return relative.clamp(1 / SPREAD, SPREAD).float()
