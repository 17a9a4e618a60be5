"""How is a matrix rounded to two bits, in each of the forms that compare_int2.py compares?

int4         the whole record, for comparison
ships        nested: the high plane; scale and zero are INT4's, times four (codec.decode_int2)
factor       nested: the same, times one factor for each group size; no more bytes
own          nested: the high plane with its own fitted scale and zero, stored beside
independent  a second copy: its own codes, scale and zero
both         nested as `ships`, from INT4 codes, scale and zero of the least sum of INT4's
             squared error and a share of the head's; `both-int4` is their whole record
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fate_moe.quant.quantize import quantize

FORMS = ("int4", "ships", "factor", "own", "independent", "both-int4", "both")
SPANS = (1.0, 0.85, 0.7, 0.6, 0.5)  # start ranges, as a share of min..max
REFITS = 4  # per start range
HEAD_SHARE = 0.1  # of the head's squared error in what `both` keeps low


def bits_read(form: str, group: int) -> float:
    """Bits a weight that reading the form moves: codes, and an fp16 scale and zero per group."""
    return (4 if form.endswith("int4") else 2) + 32 / group


def bits_added(form: str, group: int) -> float:
    """Bits a weight that the form takes on disk beside the INT4 record."""
    return {"own": 32 / group, "independent": bits_read(form, group)}.get(form, 0.0)


def rebuild(form: str, weight: Tensor, group: int, head_share: float = HEAD_SHARE) -> Tensor:
    """Round a matrix [N, K] and return what its form stands for, float32 [N, K]."""
    flat = weight.float().reshape(-1, group)
    codes, scale, zero = (x.float().view(len(flat), -1) for x in quantize(weight, group))
    if form.startswith("both"):
        codes, scale, zero = _chosen_for_both(flat, codes, scale, zero, head_share)
    high = (codes / 4).floor()
    if form.endswith("int4"):
        made = (codes - zero) * scale
    elif form == "own":
        own_scale, own_zero = _refit(flat, high)
        made = (high - own_zero) * own_scale
    elif form == "independent":
        made = _independent(flat, high)
    else:
        made = _head(codes, scale, zero) * (factor(group) if form == "factor" else 1.0)
    return made.view(weight.shape)


@cache
def factor(group: int) -> float:
    """What the head of Gaussian weights is best multiplied by: outer codes stand too far out."""
    flat = torch.randn(1 << 12, group, generator=torch.Generator().manual_seed(0))
    head = rebuild("ships", flat, group)
    return ((head * flat).sum() / head.square().sum()).item()


def _head(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((codes / 4).floor() - (zero - 1.5) / 4) * (4 * scale)


def _refit(flat: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of flat = scale * (codes - zero), as fp16 holds it; [M, 1] each."""
    mean_code, mean = codes.mean(1, keepdim=True), flat.mean(1, keepdim=True)
    spread = (codes - mean_code).square().sum(1, keepdim=True)
    along = ((codes - mean_code) * (flat - mean)).sum(1, keepdim=True)
    scale = torch.where(spread > 0.5, along / spread, 1.0).half().float()
    scale.masked_fill_(scale == 0, 1.0)
    return scale, (mean_code - mean / scale).half().float()


def _starts(flat: Tensor, max_code: int) -> Iterator[tuple[Tensor, Tensor]]:
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    for span in SPANS:
        scale = ((high - low) * span / max_code).half().float()
        scale.masked_fill_(scale == 0, 1.0)
        yield scale, (max_code / 2 - (low + high) / 2 / scale).half().float()


def _nearest(flat: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    return (flat / scale + zero).round_().clamp_(0, max_code)


def _independent(flat: Tensor, high: Tensor) -> Tensor:
    """Search two-bit codes, scale and zero; the nested ones are tried too, so never worse."""
    least, best = flat.new_full((len(flat), 1), float("inf")), torch.zeros_like(flat)
    for codes in (high, *(_nearest(flat, *start, 3) for start in _starts(flat, 3))):
        for _ in range(REFITS):
            scale, zero = _refit(flat, codes)
            made = (codes - zero) * scale
            error = _squared(flat, made)
            best = torch.where(error < least, made, best)
            least = torch.minimum(error, least)
            codes = _nearest(flat, scale, zero, 3)
    return best


def _chosen_for_both(
    flat: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, head_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Search INT4 codes, scale and zero again, from those found, with the head's error counted."""

    def loss(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        head = _squared(flat, _head(codes, scale, zero))
        return _squared(flat, (codes - zero) * scale) + head_share * head

    best, least = (codes, scale, zero), loss(codes, scale, zero)
    for scale, zero in _starts(flat, 15):
        for _ in range(REFITS):
            codes = _nearest(flat, scale, zero, 15)
            now = loss(codes, scale, zero)
            new = (codes, scale, zero)
            best = tuple(torch.where(now < least, *pair) for pair in zip(new, best, strict=True))
            least = torch.minimum(now, least)
            scale, zero = _refit(flat, codes)
    return best


def _squared(flat: Tensor, made: Tensor) -> Tensor:
    return (flat - made).square().sum(1, keepdim=True)
