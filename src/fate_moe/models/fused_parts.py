"""How are a norm, a router, a linear layer and a dense feed-forward computed natively, in one call?

All for one token, the feed-forward for many as well. Recognised by structure, tried on
random input beside the module's own forward, left alone where that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fate_moe.compute.native import GateForm
from fate_moe.models.cache_growing import is_plain
from fate_moe.models.fused_step import (
    Matrix,
    are_tokens,
    differs,
    is_one_token,
    norm_of,
    stand_ins,
)
from fate_moe.models.gate_form import apply_gate
from fate_moe.models.turnstile import Turnstile
from fate_moe.native import core

_PROJECTIONS = "gate_proj", "up_proj", "down_proj"
_DRAWS = (0.1, 1), (1.0, 1), (10.0, 1), (1.0, 1), (1.0, 3)
"""Scale and number of the random tokens that are tried."""


_WORTH_SHARING = 2**16
"""Weights from which on several cores share a product; below, torch is as fast."""

_NOTHING = torch.empty(0)


class Fused(Protocol):
    """One module's native forward, and the module's own."""

    forward: Callable[..., Any]
    own: Callable[..., Any]


class FusedNorm:
    """An RMS norm's one-token forward."""

    def __init__(self, module: Any) -> None:
        """Bind a norm, or raise TypeError: it is none."""
        self._weight, self._eps = norm_of(module)
        self.width = self._weight.numel()
        self._address = self._weight.data_ptr()
        self._norm = core().rms_norm
        self.tolerance = 1e-5
        self.own = module.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Norm one token natively, others, or with a gate, as ever."""
        if args or kwargs or not is_one_token(hidden_states, self.width):
            return self.own(hidden_states, *args, **kwargs)
        out = torch.empty_like(hidden_states)
        self._norm(hidden_states.data_ptr(), self._address, self.width, self._eps, out.data_ptr())
        return out


class FusedRouter:
    """The one-token forward of a router that takes a softmax, then the k largest.

    Attributes:
        module: whose `top_k` and weights these are.
        experts, k: E and K.
    """

    def __init__(self, module: Any, normalized: bool) -> None:
        """Bind a router, or raise AttributeError, TypeError or ValueError: it is none."""
        if dict(module.named_parameters()).keys() != {"weight"} or any(module.buffers()):
            raise TypeError("it has more than a matrix")
        self._weight = module.weight.detach()
        experts, self.width = self._weight.shape
        if not is_plain(self._weight) or experts != int(module.num_experts):
            raise TypeError("its matrix is of another kind")
        self.module = module
        self.experts, self.k = experts, int(module.top_k)
        self.block = core().RouterBlock(
            self._weight.data_ptr(), experts, self.width, self.k, normalized
        )
        self.tolerance = 1e-4
        self.own = module.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Choose one token's experts natively, those of others as ever.

        Returns:
            logits [1, E], topk_weights [1, K], topk_ids [1, K].
        """
        if args or kwargs or not is_one_token(hidden_states, self.width):
            return self.own(hidden_states, *args, **kwargs)
        logits = torch.empty(1, self.experts)
        weights = torch.empty(1, self.k)
        ids = torch.empty(1, self.k, dtype=torch.long)
        self.block.run(
            hidden_states.data_ptr(), logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        )
        return logits, weights, ids


class FusedLinear:
    """The one-token forward of a linear layer of floats, such as the vocabulary's.

    torch takes up to three times as long to read so large a matrix once (docs/performance.md).
    """

    draws = ((1.0, 1),)  # each try reads the matrix twice, and there is one formula only

    def __init__(self, module: Any) -> None:
        """Bind a linear layer, or raise TypeError: it is none, or too small to gain."""
        if type(module) is not nn.Linear or module.weight.numel() < _WORTH_SHARING:
            raise TypeError("no large linear layer of floats")
        self._kept = Matrix(module)
        self._matrix, self._project = self._kept.projection, core().project
        self.width, self._rows = module.in_features, module.out_features
        self.tolerance = self._kept.tolerance
        self.own = module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Multiply one token [.., D] natively, others as ever."""
        if not is_one_token(x, self.width):
            return self.own(x)
        y = torch.empty(*x.shape[:-1], self._rows)
        self._project(self._matrix, x.data_ptr(), 1, y.data_ptr())
        return y


class FusedDense:
    """The forward of a gated feed-forward, such as a shared expert: of one token, or of many.

    Attributes:
        alone: held from `start` to `finish`: between them it has memory that it works with.
    """

    def __init__(self, module: Any, share: Tensor | None = None) -> None:
        """Bind a feed-forward, or raise KeyError, TypeError or ValueError: it is none.

        Args:
            share: weights [D] whose product with x, through a sigmoid, the result is scaled by.
        """
        if set(module._modules) - {*_PROJECTIONS, "act_fn"}:
            raise TypeError("it has more than three matrices")
        self.module = module
        self.projections = tuple(module._modules[name] for name in _PROJECTIONS)
        matrices = [Matrix(one) for one in self.projections]
        self._kept = matrices
        self._parts = [(name, one) for name, one in module._modules.items() if one is not None]
        self.width = int(self.projections[0].in_features)
        native, form = core(), _form_of(self)
        if form is None:
            raise TypeError("its activation is of another kind")
        act = getattr(native.Act, form.act)
        gate = native.Gate(act, form.alpha, form.limit, form.offset, form.limit_after)
        self._share = share
        self._x = _NOTHING  # held for the cores that compute with it
        self.alone = Turnstile()
        address = 0 if share is None else share.data_ptr()
        self.block = native.DenseBlock(*(one.projection for one in matrices), gate, address)
        self._takes_many = self.block.takes_many
        self.tolerance = max(one.tolerance for one in matrices)
        self.own = module.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute tokens natively, others as ever."""
        if args or kwargs or not self.takes(hidden_states) or self.is_watched():
            return self.own(hidden_states, *args, **kwargs)
        self.start(hidden_states)
        return self.finish()

    def takes(self, x: Tensor) -> bool:
        """Say whether these tokens can be computed natively."""
        if is_one_token(x, self.width):
            return True
        return self._takes_many and are_tokens(x, self.width)

    def start(self, x: Tensor) -> None:
        """Take over tokens x [.., D]; with a single one other cores begin.

        Waits while another thread is between `start` and `finish`.
        """
        self.alone.enter()
        try:
            self._x = x
            if x.numel() == self.width:
                self.block.start(x.data_ptr())
        except BaseException:
            self._end()
            raise

    def finish(self) -> Tensor:
        """Return what was started, [.., D]."""
        try:
            x = self._x
            out = torch.empty_like(x)
            if x.numel() == self.width:
                self.block.finish(out.data_ptr())
            else:
                self.block.many(x.data_ptr(), x.numel() // self.width, out.data_ptr())
            return out
        finally:
            self._end()

    def drop(self) -> None:
        """Forget what this thread started and did not finish, once no core computes with it."""
        if self._x.numel() == self.width:
            self.finish()
        else:
            self._end()

    def _end(self) -> None:
        self._x = _NOTHING  # every layer would hold on to its prompt
        self.alone.leave()

    def is_watched(self) -> bool:
        """Say whether somebody hooked a part or put another in its place."""
        modules = self.module._modules
        return any(
            modules.get(name) is not one or one._forward_hooks or one._forward_pre_hooks
            for name, one in self._parts
        )


@torch.no_grad()
def _form_of(fused: FusedDense) -> GateForm | None:
    """Find which activation stands between the matrices, for which stand-ins give numbers."""
    gate_proj, up_proj, down_proj = fused.projections
    width = int(gate_proj.out_features)
    draw = torch.Generator().manual_seed(0)
    gate, up = (4 * torch.randn(1, width, generator=draw) for _ in range(2))
    ways = {
        gate_proj: lambda x: gate.clone(),
        up_proj: lambda x: up.clone(),
        down_proj: lambda x: x,
    }
    with stand_ins(ways):
        want = fused.module(torch.zeros(1, fused.width))
    both = torch.cat([gate, up], dim=1)
    forms = (GateForm(act) for act in ("SILU", "GELU_TANH", "GELU", "RELU"))
    return next((form for form in forms if not differs(apply_gate(form, both), want, 1e-5)), None)


_MAKERS: dict[str, list[Callable[[Any], Any]]] = {
    "router": [lambda module: FusedRouter(module, False), lambda module: FusedRouter(module, True)],
    "dense": [FusedDense],
    "norm": [FusedNorm],
    "linear": [FusedLinear],
}


def fuse_part(module: nn.Module) -> tuple[str, Fused] | None:
    """Make a module's native forward and try it; None where none of the kinds fits."""
    refusals = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    for kind, makers in _MAKERS.items():
        for make in makers:
            try:
                fused = make(module)
                if _equals(fused):
                    return kind, fused
            except refusals:
                continue
    return None


@torch.no_grad()
def _equals(fused: Any) -> bool:
    draw = torch.Generator().manual_seed(0)
    for scale, count in getattr(fused, "draws", _DRAWS):
        x = scale * torch.randn(count, fused.width, generator=draw)
        want, got = fused.own(x.clone()), fused.forward(x)
        if isinstance(want, Tensor):
            want, got = (want,), (got,)
        if not isinstance(want, tuple) or len(want) != len(got):
            return False
        for a, b in zip(got, want, strict=True):
            if a.dtype is not b.dtype or differs(a, b, fused.tolerance):
                return False
    return True
