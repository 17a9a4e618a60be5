"""Is the grid that weights came on better than the one found for them?

Weights that were quantized before lie on a grid already, up to rounding its scale and zero to fp16.
Searching for it again from the weights alone misses it where a group uses no extreme code.
Invariant: on no group is the squared error above that of the codes handed in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fate_moe.quant.quantize import MAX_CODE, Quantized

_CHUNK = 1 << 18  # weights per step, as in `quantize`


class Grid(NamedTuple):
    """scale and zero float32 [N, K / group]: weight = (q - zero) * scale; any value, also NaN."""

    scale: Tensor
    zero: Tensor


def better(weight: Tensor, found: Quantized, grid: Grid, *, bits: int) -> Quantized:
    """Take the grid, rounded to fp16, for each group on which it loses less than `found`.

    Args:
        weight: float matrix [N, K], finite.
        found: its codes, scales and zeros so far.
        grid: what is known of its groups; as many as `found` has.
        bits: 4 or 8.
    """
    groups = found.scale.numel()
    flat = weight.reshape(groups, -1)
    codes = found.codes.reshape(groups, -1).clone()
    scale, zero = found.scale.reshape(-1, 1).clone(), found.zero.reshape(-1, 1).clone()
    new_scale, new_zero = grid.scale.reshape(-1, 1).half(), grid.zero.reshape(-1, 1).half()
    step = max(1, _CHUNK // flat.shape[1])
    for start in range(0, groups, step):
        part = slice(start, start + step)
        chunk, s, z = flat[part].float(), new_scale[part].float(), new_zero[part].float()
        new = (chunk / s + z).nan_to_num().round().clamp(0, MAX_CODE[bits])
        old_error = _error(chunk, codes[part].float(), scale[part].float(), zero[part].float())
        wins = _error(chunk, new, s, z) < old_error  # false for NaN and infinity
        codes[part] = torch.where(wins, new.to(torch.uint8), codes[part])
        scale[part] = torch.where(wins, new_scale[part], scale[part])
        zero[part] = torch.where(wins, new_zero[part], zero[part])
    return Quantized(
        codes.view_as(found.codes), scale.view_as(found.scale), zero.view_as(found.zero)
    )


def _error(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    residual = (codes - zero) * scale - weight
    error: Tensor = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    return error
