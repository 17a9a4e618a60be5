"""How are the norms and the sums around attention computed in the same native call as it?

For decoder layers that are x + attention(norm(x)), then that + feed-forward(norm(that)). Tried, as
attention is, beside the layer's own forward, with stand-ins for attention and feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.models.fused_attention import FusedAttention
from fate_moe.models.fused_step import differs, is_one_token, norm_of, stand_ins
from fate_moe.native import core

_ATTENTION, _BEFORE, _AFTER = "self_attn", "input_layernorm", "post_attention_layernorm"


class FusedLayer:
    """The one-token forward of one decoder layer."""

    def __init__(self, module: Any, attention: FusedAttention) -> None:
        """Bind a layer whose attention is fused already.

        Raises:
            KeyError, TypeError, ValueError: it is built otherwise.
        """
        children = module._modules
        known = (_ATTENTION, _BEFORE, _AFTER)
        (self._name,) = (name for name in children if name not in known)
        self.module, self.attention = module, attention
        self.inner = tuple(children[name] for name in known)
        self.feed_forward = children[self._name]
        self.residual = float(getattr(module, "residual_multiplier", 1.0))
        norms = [norm_of(one) for one in self.inner[1:]]
        native = core()
        before, after = (native.Norm(weight.data_ptr(), eps) for weight, eps in norms)
        self.block = attention.block(before, after, self.residual)
        self.norms = norms
        self.width = attention.width
        if any(weight.numel() != self.width for weight, _ in norms):
            raise ValueError("a norm is of another width")
        self.own = module.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute one token natively, anything else as ever; as the family's own forward."""
        if args or not is_one_token(hidden_states, self.width) or self._is_watched():
            return self.own(hidden_states, *args, **kwargs)
        slot = self.attention.slot(kwargs)
        if slot is None:
            return self.own(hidden_states, **kwargs)
        shape = hidden_states.shape
        out, normed = torch.empty(shape), torch.empty(shape)
        self.block.layer(
            hidden_states.data_ptr(), slot.cos, slot.sin, slot.keys, slot.values, slot.stride,
            slot.length, out.data_ptr(), normed.data_ptr(),
        )  # fmt: skip
        slot.layer.take()
        return out.add_(self.feed_forward(normed), alpha=self.residual)

    def _is_watched(self) -> bool:
        """Say whether somebody hooked what would not be called, or put something in its place."""
        children = self.module._modules
        attention, before, after = self.inner
        return bool(
            attention._forward_hooks
            or attention._forward_pre_hooks
            or before._forward_hooks
            or after._forward_hooks
            or children[_ATTENTION] is not attention
            or children[_BEFORE] is not before
            or children[_AFTER] is not after
            or children[self._name] is not self.feed_forward
        )


def fuse_layer(module: Any, attention: FusedAttention) -> FusedLayer | None:
    """Make a layer's one-token forward and try it; None where it does not fit."""
    if attention.matrices is None:
        return None
    refusals = (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        fused = FusedLayer(module, attention)
        return fused if _equals(fused) else None
    except refusals:
        return None


@torch.no_grad()
def _equals(fused: FusedLayer) -> bool:
    """Try the layer's own forward around stand-ins: what goes in, what comes out of them?"""
    draw = torch.Generator().manual_seed(0)
    x, added, grown = (torch.randn(1, 1, fused.width, generator=draw) for _ in range(3))
    x = 7 * x
    seen: list[Tensor] = []

    def attention(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append(hidden_states.clone())
        return added.clone(), None

    def feed_forward(hidden_states: Tensor) -> Tensor:
        seen.append(hidden_states.clone())
        return grown.clone()

    call: dict[str, Any] = {
        "position_embeddings": (torch.ones(1, 1, 2), torch.zeros(1, 1, 2)),
        "position_ids": torch.zeros(1, 1, dtype=torch.long),
        "attention_mask": None,
        "past_key_values": None,
    }
    with stand_ins({fused.inner[0]: attention, fused.feed_forward: feed_forward}):
        got = fused.own(x.clone(), **call)
    middle = x + fused.residual * added
    want = [_norm(x, *fused.norms[0]), _norm(middle, *fused.norms[1])]
    want.append(middle + fused.residual * grown)
    seen.append(got)
    return len(seen) == 3 and not any(differs(a, b) for a, b in zip(seen, want, strict=True))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    core().rms_norm(x.data_ptr(), weight.data_ptr(), weight.numel(), eps, out.data_ptr())
    return out


def layers_of(model: nn.Module) -> list[tuple[Any, Any]]:
    """List (layer, its attention) for every module of a model that has such a child."""
    return [
        (module, module._modules[_ATTENTION])
        for module in model.modules()
        if module._modules.get(_ATTENTION) is not None
    ]
