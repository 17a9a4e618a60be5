"""Which of the native core's activations does a family's expert compute?

Asked, not looked up by name: every form that the module's own numbers allow is tried on random
input, and the first that gives what the module gives is taken. None fits: the experts of that
family are computed by `eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe.compute.native import GateForm

_WIDTH = 64
_TOLERANCE = 1e-5  # relative; a wrong form is off by far more

_ACTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "SILU": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "GELU": lambda x, alpha: F.gelu(x),
    "GELU_TANH": lambda x, alpha: F.gelu(x, approximate="tanh"),
    "RELU": lambda x, alpha: F.relu(x),
    "RELU2": lambda x, alpha: F.relu(x).square(),
}


def find_gate_form(experts: nn.Module) -> GateForm | None:
    """Return the form of a family's experts module, or None where no native one equals it."""
    module: Any = experts
    if getattr(module, "has_post_expert_norm", False):
        return None
    gated = bool(getattr(module, "has_gate", True))
    # Large enough to meet every limit, close enough to zero to tell the activations apart.
    edge = max([12.0, *(2 * abs(limit) for limit in _numbers(module, "limit"))])
    order = torch.randperm(2 * _WIDTH, generator=_seeded())
    values = torch.linspace(-edge, edge, 2 * _WIDTH)[order]
    sample = torch.stack([values, values / 4, values / 40])
    try:
        with torch.no_grad():
            want = module._apply_gate(sample) if gated else module.act_fn(sample)
    except (AttributeError, RuntimeError, TypeError):
        return None
    for form in _forms(module, gated):
        if torch.allclose(apply_gate(form, sample), want, rtol=_TOLERANCE, atol=_TOLERANCE):
            return form
    return None


def apply_gate(form: GateForm, up: Tensor) -> Tensor:
    """Compute the form on the first matrix's output [n, 2F], or [n, F] without a gate."""
    act = _ACTS[form.act]
    if not form.gated:
        return act(up, form.alpha)
    gate, up = (up[:, ::2], up[:, 1::2]) if form.interleaved else up.chunk(2, dim=-1)
    if form.limit_after:
        a = act(gate, form.alpha).clamp(max=form.limit)
    else:
        a = act(gate.clamp(max=form.limit), form.alpha)
    return a * (up.clamp(-form.limit, form.limit) + form.offset)


def _forms(module: Any, gated: bool) -> Iterator[GateForm]:
    if not gated:
        yield from (GateForm(act, gated=False) for act in _ACTS)
        return
    alphas = [1.0, *_numbers(module, "alpha")]
    limits = [float("inf"), *_numbers(module, "limit")]
    for act, limit, alpha in product(_ACTS, limits, alphas):
        form = GateForm(act, alpha=alpha, limit=limit)
        for offset, interleaved, after in product((0.0, 1.0), (False, True), (False, True)):
            yield replace(form, offset=offset, interleaved=interleaved, limit_after=after)


def _numbers(module: Any, word: str) -> list[float]:
    numbers = (v for k, v in vars(module).items() if word in k and isinstance(v, (int, float)))
    return [float(number) for number in numbers if isfinite(number)]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
