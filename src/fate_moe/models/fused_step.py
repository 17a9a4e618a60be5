"""When may a fused forward stand in for the family's own, and what does it need to know?

It stands in for one token of one sequence that may look at all that is cached, in float32, on the
CPU, without gradients. Everything else goes the family's own way, on the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fate_moe.models.cache_growing import (
    GrowingLayer,
    GrowingSlidingLayer,
    Row,
    growing_layer,
    is_plain,
)
from fate_moe.models.quantized import RecordLinear
from fate_moe.native import core

TOLERANCE = 1e-4
"""Most by which a fused forward may differ from the family's own, relative to the largest value:
float32 sums in another order stay well below, another formula does not."""

CODES_TOLERANCE = 3e-2
"""The same where matrices are records: there a last bit can move an activation's eight-bit code."""

# Keyword arguments of a decoder layer, or its attention, that change nothing it computes for one
# token once the rotary embedding is given.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits"}
)


GrowingLayers = GrowingLayer | GrowingSlidingLayer


class Positions:
    """The rotary embedding and the mask of a step, looked at once for all layers."""

    def __init__(self) -> None:
        # One tuple each, replaced whole: threads may take turns between any two lines.
        self._turn: tuple[Tensor | None, Tensor | None, tuple[int, int]] = None, None, (0, 0)
        self._mask: tuple[Tensor | None, bool] = None, False

    def addresses(self, embeddings: Any, rotary: int) -> tuple[int, int] | None:
        """Find cos and sin [1, 1, rotary]; None where they are anything else."""
        if type(embeddings) is not tuple or len(embeddings) != 2:
            return None
        cos, sin = embeddings
        turn = self._turn
        if cos is not turn[0] or sin is not turn[1]:
            if not all(is_plain(one) and one.numel() == cos.shape[-1] for one in (cos, sin)):
                return None
            turn = self._turn = cos, sin, (cos.data_ptr(), sin.data_ptr())
        return turn[2] if cos.numel() == rotary else None

    def sees_all(self, mask: Any, tokens: int) -> bool:
        """Say whether a mask hides none of so many cached tokens, the newest included."""
        if mask is None:
            return True
        if not isinstance(mask, Tensor) or mask.numel() != tokens:
            return False
        seen = self._mask
        if mask is not seen[0]:
            is_open = bool((mask if mask.dtype is torch.bool else mask == 0).all())
            seen = self._mask = mask, is_open
        return seen[1]


class Slot:
    """What one step of one layer computes on: addresses, and the layer to count the token in."""

    __slots__ = ("cos", "keys", "layer", "length", "sin", "stride", "values")

    def __init__(
        self,
        turn: tuple[int, int],
        row: Row,
        layer: GrowingLayers,
    ) -> None:
        self.cos, self.sin = turn
        self.keys, self.values, self.stride, self.length = row
        self.layer = layer


def is_one_token(x: Tensor, width: int) -> bool:
    """Say whether x is one token [.., width] that the native core can read, with no gradients."""
    one = x.numel() == width == x.shape[-1]
    return one and is_plain(x) and not torch.is_grad_enabled()


def are_tokens(x: Tensor, width: int) -> bool:
    """Say whether x is tokens [.., width] that the native core can read, with no gradients."""
    some = x.shape[-1] == width and x.numel() > 0
    return some and is_plain(x) and not torch.is_grad_enabled()


def find_slot(
    kwargs: dict[str, Any],
    index: int,
    rotary: int,
    limit: int,
    positions: Positions,
) -> Slot | None:
    """Look up where a layer's next token goes; None where the family's own way must be gone.

    Args:
        kwargs: of the layer's, or its attention's, call.
        index: of the layer in the cache.
        rotary: elements of a head that are turned.
        limit: tokens that the cache will hold at most, as far as is known.
        positions: shared by all layers.
    """
    call = read_call(kwargs)
    if call is None:
        return None
    turn = positions.addresses(call.embeddings, rotary)
    found = None if turn is None else find_row(call.past, index, limit)
    if turn is None or found is None or not positions.sees_all(call.mask, found[1][3] + 1):
        return None
    layer, row = found
    return Slot(turn, row, layer)


class Call(NamedTuple):
    """What a layer's arguments say besides what it computes on."""

    embeddings: Any
    mask: Any
    past: Any


def read_call(kwargs: dict[str, Any]) -> Call | None:
    """Look through a layer's arguments; None where one changes what it computes."""
    embeddings = mask = past = None
    for name, value in kwargs.items():
        if name == "position_embeddings":
            embeddings = value
        elif name == "attention_mask":
            mask = value
        elif name == "past_key_values":
            past = value
        elif name not in _HARMLESS or (value is True and name == "output_attentions"):
            return None
    return Call(embeddings, mask, past)


def find_row(past: Any, index: int, limit: int) -> tuple[GrowingLayers, Row] | None:
    """Find where a layer of a cache takes one sequence's next token, and that row's place."""
    layer = None if past is None else growing_layer(past, index, limit)
    row = None if layer is None else layer.row()
    if layer is None or row is None:
        return None
    keys = layer._rows.keys  # type: ignore[union-attr]
    return (layer, row) if keys.shape[0] == 1 and is_plain(keys) else None


class Matrix:
    """A linear layer's weights as the native core takes them, and what keeps them in memory.

    Attributes:
        projection: the native `Projection`.
        tolerance: what a forward that uses it may differ by.
    """

    def __init__(self, module: nn.Module) -> None:
        """Bind a linear layer that is a record, or plain and float32.

        Raises:
            TypeError: it is neither.
        """
        native = core()
        bias = getattr(module, "bias", None)
        self._kept = [None if bias is None else bias.detach().float().contiguous()]
        address = 0 if self._kept[0] is None else self._kept[0].data_ptr()
        if type(module) is RecordLinear and module.native and module.record is not None:
            (matrix,), (at,) = module.layout.matrices, module.layout.offsets
            self._kept.append(module.record)
            start = module.record.data_ptr()
            if module.layout.is_unquantized:
                shape = matrix.rows, matrix.cols
                self.projection = native.Projection.of_bfloats(*shape, start, address)
                self.tolerance = TOLERANCE
                return
            place = native.MatrixPlace(
                matrix.rows, matrix.cols, matrix.group, module.layout.bits,
                at.scale, at.zero, at.high, at.low,
            )  # fmt: skip
            self.projection = native.Projection.of_record(place, start, address)
            self.tolerance = CODES_TOLERANCE
        elif type(module) is nn.Linear and is_plain(module.weight):
            weight = module.weight.detach()
            self._kept.append(weight)
            self.projection = native.Projection.of_floats(*weight.shape, weight.data_ptr(), address)
            self.tolerance = TOLERANCE
        else:
            raise TypeError(f"no native product for a {type(module).__name__}")


def norm_of(module: Any) -> tuple[Tensor, float]:
    """Return weight and epsilon of a module that looks like an RMS norm.

    Raises:
        TypeError: it does not.
    """
    weight = module._parameters.get("weight")  # `weight` of a record would be unpacked
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    looks = isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float)
    if not looks or not is_plain(weight) or getattr(module, "bias", None) is not None:
        raise TypeError(f"no native norm for a {type(module).__name__}")
    return weight.detach(), eps  # type: ignore[return-value]


def differs(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Say whether two results are further apart than allowed, or not numbers."""
    if got.shape != want.shape:
        return True
    most = max(float(want.abs().max()), 1e-30)
    return not float((got - want).abs().max()) <= tolerance * most  # a NaN differs


@contextmanager
def stand_ins(ways: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the scope, modules compute something else: what surrounds them can be tried."""
    before = {module: module.__dict__["forward"] for module in ways if "forward" in module.__dict__}
    try:
        for module, way in ways.items():
            module.__dict__["forward"] = way
        yield
    finally:
        for module in ways:
            del module.__dict__["forward"]
        for module, own in before.items():
            module.__dict__["forward"] = own
