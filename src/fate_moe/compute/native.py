"""What is the sum of a token's experts, computed from their slots by the native core?

The weights are those of the record, bit for bit; the activations that meet them are rounded to
eight bits, by groups of 64 or 32 with a scale each, once before an expert's first matrix and once
before its second. A sum over a group is exact; what is added up across groups is float32. So the
result differs from `eager` by the rounding of activations, about 0.6 % of a matrix product's norm,
but depends, as there, neither on the order of arrival nor on what is resident nor on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fate_moe.compute.eager import Arriving
from fate_moe.native import core
from fate_moe.quant.record import RecordLayout


@dataclass(frozen=True, slots=True)
class GateForm:
    """What stands between an expert's two matrices.

    Gated: act(min(gate, limit)) * (clamp(up, -limit, limit) + offset). Otherwise act(up).

    Attributes:
        act: SILU, GELU, GELU_TANH, RELU or RELU2.
        gated: the first matrix holds gate and up rows.
        interleaved: they alternate; otherwise all gates come first.
        alpha: of SILU, x * sigmoid(alpha * x).
        limit: of gate and up; infinity for none.
        offset: added to up.
        limit_after: the gate's limit comes after the activation.
    """

    act: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")
    offset: float = 0.0
    limit_after: bool = False


def can_compute(layout: RecordLayout) -> bool:
    """Say whether the native core reads records of this layout: codes of 4 or 8 bits."""
    return layout.bits in (4, 8)


class NativeExperts:
    """Run experts where they lie, all that have landed in one call.

    Attributes:
        layout: of the layer's records.
        shape: the native `ExpertShape`.
        slot_address: where a slot's bytes start.
    """

    def __init__(
        self,
        layout: RecordLayout,
        form: GateForm,
        slot_address: Callable[[int], int],
        step: Any,
    ):
        """Bind what one MoE layer needs.

        Args:
            layout: of the layer's records; `can_compute` has said yes.
            form: the family's activation.
            slot_address: where a slot's bytes start.
            step: the native `Step` that an engine's layers share; it holds their scratch memory.
        Raises:
            NativeUnavailable: there is no native core.
        """
        self.layout = layout
        self.shape = _shape(layout, form)
        self.slot_address = slot_address
        self._step = step

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        arriving: Arriving,
    ) -> Tensor:
        """Return the weighted sum over each token's experts, [T, D]; see `EagerExperts`."""
        tokens = x.float().contiguous()
        ids = topk_ids.long().contiguous()
        weights = topk_weights.float().contiguous()
        out = torch.empty_like(tokens)
        step = self._step
        count, k = ids.shape
        what = (
            self.shape, tokens.data_ptr(), count, k, ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        arrivals = iter(arriving)
        landed = next(arrivals, [])
        if count == 1 and len(landed) == k:  # a call costs as much as a small expert
            step.whole(*what, self.places(landed), out.data_ptr())
            return out.to(x.dtype)
        step.begin(*what)
        while landed:
            step.run(self.places(landed))
            landed = next(arrivals, [])
        step.finish(out.data_ptr())
        return out.to(x.dtype)

    def places(self, landed: Sequence[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
        """Return the (expert, address, low) of experts that have landed in slots."""
        address = self.slot_address
        return [(expert, address(slot), low) for expert, slot, low in landed]


def matrix_place(layout: RecordLayout, index: int) -> Any:
    """Describe matrix `index` of a record to the native core."""
    matrix, at = layout.matrices[index], layout.offsets[index]
    return core().MatrixPlace(
        matrix.rows, matrix.cols, matrix.group, layout.bits, at.scale, at.zero, at.high, at.low
    )


def _shape(layout: RecordLayout, form: GateForm) -> Any:
    native = core()
    names = [matrix.name for matrix in layout.matrices]
    up = "gate_up_proj" if form.gated else "up_proj"
    biases = dict(zip([b.name for b in layout.biases], layout.bias_offsets, strict=True))
    return native.ExpertShape(
        matrix_place(layout, names.index(up)),
        matrix_place(layout, names.index("down_proj")),
        form.gated,
        form.interleaved,
        native.Gate(native.Act[form.act], form.alpha, form.limit, form.offset, form.limit_after),
        biases.get(f"{up}_bias", -1),
        biases.get("down_proj_bias", -1),
    )
