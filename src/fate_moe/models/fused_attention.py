"""How is a family's attention computed for one token in one native call?

Recognised by structure: projections q, k, v and o, a rotary embedding, perhaps norms of queries and
keys. Whether that structure computes what it seems to is tried on random input beside the family's
own forward; where it does not, the module is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.models.fused_step import (
    Matrix,
    Positions,
    Slot,
    differs,
    find_slot,
    is_one_token,
    norm_of,
    stand_ins,
)
from fate_moe.native import core

_NAMES = "q_proj", "k_proj", "v_proj", "o_proj"
_HISTORY, _STEPS = 3, 3
_FAR = 1 << 20  # a position past which a family that scales by position shows it


class FusedAttention:
    """The one-token forward of one attention module.

    Attributes:
        index: of its layer in the cache.
        shape: the native `AttentionShape`.
        matrices: its projections, or None where one is of a kind that the core does not know.
    """

    def __init__(self, module: Any, rotary: int, limit: int, positions: Positions) -> None:
        """Bind an attention module.

        Raises:
            AttributeError, TypeError, ValueError: it is built otherwise.
        """
        self.module = module
        self.index = int(module.layer_idx)
        self.rotary, self.limit, self.positions = rotary, limit, positions
        self.projections = tuple(module._modules[name] for name in _NAMES)
        self.dim = int(module.head_dim)
        self.heads, self.kv_heads = (
            int(one.out_features) // self.dim for one in self.projections[:2]
        )
        self._kept: list[Any] = []
        norms = [self._norm(name) for name in ("q_norm", "k_norm")]
        native = core()
        whole = len({count for count in (n[1] for n in norms) if count} - {self.dim}) > 0
        self.shape = native.AttentionShape(
            self.heads, self.kv_heads, self.dim, rotary, float(module.scaling),
            norms[0][0], norms[1][0], whole,
        )  # fmt: skip
        try:
            self.matrices: list[Matrix] | None = [Matrix(one) for one in self.projections]
        except TypeError:
            self.matrices = None
            if any(one.dtype is not torch.float32 for one in module.parameters()):
                raise
        self.own: Callable[..., Any] = module.forward
        self._block: Any = None
        if self.matrices is not None:
            none = native.Norm(0, 0.0)
            self._block = self.block(none, none, 1.0)
            self.width = int(self.projections[0].in_features)
        self._attend = native.attend

    def _norm(self, name: str) -> tuple[Any, int]:
        norm = self.module._modules.get(name)
        if norm is None:
            return core().Norm(0, 0.0), 0
        weight, eps = norm_of(norm)
        self._kept.append(weight)
        return core().Norm(weight.data_ptr(), eps), weight.numel()

    def block(self, before: Any, after: Any, residual: float) -> Any:
        """Make the native `AttentionBlock` with these norms around it."""
        assert self.matrices is not None
        parts = [matrix.projection for matrix in self.matrices]
        return core().AttentionBlock(self.shape, *parts, before, after, residual)

    def slot(self, kwargs: dict[str, Any]) -> Slot | None:
        """Say where this step goes, None where the family's own way must be gone."""
        modules = self.module._modules
        for name, one in zip(_NAMES, self.projections, strict=True):
            if modules[name] is not one or one._forward_hooks:
                return None
        return find_slot(kwargs, self.index, self.rotary, self.limit, self.positions)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute one token natively, anything else as ever; as the family's own forward."""
        shape = hidden_states.shape
        if args or not is_one_token(hidden_states, shape[-1]):
            return self.own(hidden_states, *args, **kwargs)
        slot = self.slot(kwargs)
        if slot is None:
            return self.own(hidden_states, **kwargs)
        if self._block is None or shape[-1] != self.width:
            return self._between_modules(hidden_states, slot), None
        out = torch.empty(shape)
        self._block.attention(
            hidden_states.data_ptr(), slot.cos, slot.sin, slot.keys, slot.values, slot.stride,
            slot.length, out.data_ptr(),
        )  # fmt: skip
        slot.layer.take()
        return out, None

    def _between_modules(self, x: Tensor, slot: Slot) -> Tensor:
        q, k, v = (one(x) for one in self.projections[:3])
        out = self.attend(q.clone(), k.clone(), v.contiguous(), slot)
        return self.projections[3](out)  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slot: Slot) -> Tensor:
        """Attend with one token's q, k, v [1, 1, heads * dim]; changes q and k."""
        if not q.numel() == self.heads * self.dim or not k.numel() == v.numel():
            raise ValueError(f"{type(self.module).__name__}: its projections are of another size")
        out = torch.empty(1, 1, self.heads * self.dim)
        self._attend(
            self.shape, q.data_ptr(), k.data_ptr(), v.data_ptr(), slot.cos, slot.sin, slot.keys,
            slot.values, slot.stride, slot.length, out.data_ptr(),
        )  # fmt: skip
        slot.layer.take()
        return out


def fuse_attention(
    module: Any, rotaries: Iterable[int], limit: int, positions: Positions
) -> FusedAttention | None:
    """Make a module's one-token forward and try it; None where it does not fit.

    Args:
        module: any module.
        rotaries: elements of a head that the model's rotary embeddings turn; each is tried.
        limit: tokens that its cache will hold at most, as far as is known.
        positions: shared by the layers of a model.
    """
    children = getattr(module, "_modules", {})
    if not all(isinstance(children.get(name), nn.Module) for name in _NAMES):
        return None
    # A family's own forward may take other arguments, or trip over the stand-ins.
    refusals = (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
        ValueError,
    )  # fmt: skip
    try:
        for rotary in rotaries:
            fused = FusedAttention(module, rotary, limit, positions)
            if _equals(fused):
                return fused
    except refusals:
        return None
    return None


@torch.no_grad()
def _equals(fused: FusedAttention) -> bool:
    """Try the fused forward beside the module's own, on a few tokens.

    First between its projections, for which random numbers stand in, large ones too: a family
    that clips, caps or scales by position shows it. Then with them, where they are native.
    """
    draw = torch.Generator().manual_seed(0)
    scales = [(1.0, 1.0, 1.0)] * _HISTORY + [(30.0, 0.03, 1.0), (0.03, 30.0, 1.0), (1.0, 1.0, 99.0)]
    probe = _Probe(fused, draw)
    for q, k, v in scales:
        if not probe.between(q, k, v):
            return False
    if fused.matrices is None:
        return True
    probe = _Probe(fused, draw)
    return all(probe.through() for _ in range(_STEPS))


class _Probe:
    """Two caches, fed by the module's own forward and by the fused one."""

    def __init__(self, fused: FusedAttention, draw: torch.Generator) -> None:
        from transformers import DynamicCache

        self._fused, self._draw = fused, draw
        text = fused.module.config.get_text_config(decoder=True)
        self._own, self._ours = DynamicCache(config=text), DynamicCache(config=text)
        for cache in (self._own, self._ours):
            while len(cache.layers) <= fused.index:
                cache.layers.append(type(cache.layers[0])())
            cache.get_seq_length = lambda *args, **kwargs: _FAR
        self._count = 0

    def _random(self, width: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(1, 1, width, generator=self._draw)

    def _call(self, cache: Any) -> dict[str, Any]:
        angles = self._random(self._fused.rotary // 2).repeat(1, 1, 2)
        return {
            "position_embeddings": (angles.cos(), angles.sin()),
            "position_ids": torch.full((1, 1), _FAR),
            "attention_mask": None,
            "past_key_values": cache,
        }

    def between(self, q: float, k: float, v: float) -> bool:
        """Compare what reaches the output projection, given scaled q, k and v."""
        fused = self._fused
        widths = [int(one.out_features) for one in fused.projections[:3]]
        drawn = [self._random(w, s) for w, s in zip(widths, (q, k, v), strict=True)]
        ways = {
            one: lambda x, given=given: given.clone()
            for one, given in zip(fused.projections[:3], drawn, strict=True)
        }
        call = self._call(self._own)
        x = self._random(int(getattr(fused.projections[0], "in_features", widths[0])))
        with stand_ins({**ways, fused.projections[3]: lambda x: x}):
            want = fused.own(x, **call)[0]
        got = self._ours_between(drawn, call)
        return not differs(got, want)

    def _ours_between(self, drawn: list[Tensor], call: dict[str, Any]) -> Tensor:
        q, k, v = drawn
        fused = self._fused
        if not self._count:  # the first token of a cache goes the family's way: the layer is empty
            heads = (1, 1, fused.kv_heads, fused.dim)
            self._ours.layers[fused.index].update(
                torch.zeros(heads).transpose(1, 2)[:, :, :0],
                v.view(heads).transpose(1, 2)[:, :, :0],
            )
        self._count += 1
        slot = fused.slot({**call, "past_key_values": self._ours})
        if slot is None:
            raise ValueError("its cache is of another kind")
        return fused.attend(q.clone(), k.clone(), v.clone(), slot)

    def through(self) -> bool:
        """Compare whole forwards, projections included."""
        fused = self._fused
        assert fused.matrices is not None
        call = self._call(self._own)
        x = self._random(fused.width)
        want = fused.own(x, **call)[0]
        got = fused.forward(x, **{**call, "past_key_values": self._ours})[0]
        return not differs(got, want, max(matrix.tolerance for matrix in fused.matrices))
