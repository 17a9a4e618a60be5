"""What is the sum of a token's experts, computed on a GPU from its own slots?

The host knows who was chosen (the mover needs that anyway), sorts the choices by expert once, and
launches two kernels for all that has landed together. Tiles are cut from an expert's tokens alone,
and parts are summed in ascending expert id, so the result depends neither on the order of arrival
nor on what is resident. See `gpu_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fate_moe.compute.eager import Arriving
from fate_moe.compute.native import GateForm
from fate_moe.quant.record import RecordLayout

_FEW_TOKENS = 8  # up to here each choice is a tile: weights are what is read, not tokens
_TILE_TOKENS = (16, 64)  # the least that a matrix unit takes, and what registers hold
# By tokens of a tile: R rows of the matrix, B bytes of a row's plane (four weights each) at a time.
_CUTS: dict[int, dict[str, int]] = {
    1: {"R": 16, "B": 128, "num_warps": 4},
    16: {"R": 64, "B": 32, "num_warps": 4},
    32: {"R": 64, "B": 32, "num_warps": 4},
    64: {"R": 64, "B": 32, "num_warps": 4},
}
_SUM_COLUMNS = 1024


def can_compute(layout: RecordLayout) -> bool:
    """Say whether the kernels read records of this layout: codes of 4 bits, in two planes."""
    return layout.bits == 4


class GpuExperts:
    """Run experts where they lie, all that have landed in two launches."""

    def __init__(self, layout: RecordLayout, form: GateForm, slots: Tensor):
        """Bind what one MoE layer needs.

        Args:
            layout: of the layer's records; `can_compute` has said yes.
            form: the family's activation.
            slots: of the DEVICE tier, uint8 [S, slot_bytes], contiguous.
        """
        names = [matrix.name for matrix in layout.matrices]
        first = "gate_up_proj" if form.gated else "up_proj"
        self._up = _numbers(layout, names.index(first))
        self._down = _numbers(layout, names.index("down_proj"))
        self._form = {
            "ACT": form.act, "GATED": form.gated, "INTERLEAVED": form.interleaved,
            "ALPHA": form.alpha, "LIMIT": form.limit, "OFFSET": form.offset,
            "LIMIT_AFTER": form.limit_after,
        }  # fmt: skip
        self._inner = self._up["ROWS"] // (2 if form.gated else 1)
        self._slots = slots

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, arriving: Arriving
    ) -> Tensor:
        """Return the weighted sum over each token's experts, [T, D]; see `EagerExperts`."""
        (tokens, width), k = x.shape, topk_ids.shape[1]
        flat = topk_ids.flatten().cpu()
        by_expert = flat.argsort(stable=True)
        chosen = flat[by_expert]
        size = _tile_tokens(tokens, len(flat), 1 + int(chosen.diff().count_nonzero()))
        order = by_expert.int().to(x.device)
        weights = topk_weights.flatten().contiguous()
        inner = x.new_empty(len(flat), self._inner)
        parts = x.new_zeros(len(flat), width)
        x = x.contiguous()
        for landed in arriving:
            tiles = _tiles(landed, chosen, size).to(x.device)
            if len(tiles):
                self._run(tiles, size, order, k, x, weights, inner, parts)
        places = torch.empty_like(by_expert)
        places[by_expert] = torch.arange(len(flat))
        # A token's choices by ascending expert lie in ascending places.
        positions = places.view(tokens, k).sort(dim=1).values.int().to(x.device)
        out = torch.empty_like(x)
        _kernels().sum_kernel[(tokens, -(-width // _SUM_COLUMNS))](
            parts, positions, out, K=k, D=width, B=_SUM_COLUMNS
        )
        return out

    def _run(
        self, tiles: Tensor, size: int, order: Tensor, k: int, x: Tensor, weights: Tensor,
        inner: Tensor, parts: Tensor,
    ) -> None:  # fmt: skip
        cut, slot_bytes = {"M": size, **_CUTS[size]}, self._slots.stride(0)
        rows = cut["R"]
        _kernels().up_kernel[(len(tiles), -(-self._inner // rows))](
            self._slots, slot_bytes, tiles, order, x, inner, k, **self._up, **self._form, **cut
        )
        _kernels().down_kernel[(len(tiles), -(-self._down["ROWS"] // rows))](
            self._slots, slot_bytes, tiles, order, weights, inner, parts, **self._down, **cut
        )


def _tile_tokens(tokens: int, choices: int, experts: int) -> int:
    """Cut tiles by how many tokens an expert has on the mean, never by who has landed."""
    if tokens <= _FEW_TOKENS:
        return 1
    size, most = _TILE_TOKENS
    while size < most and size * experts < choices:
        size *= 2
    return size


def _tiles(landed: Any, chosen: Tensor, size: int) -> Tensor:
    """Return (slot, low, first, count) of each tile, int32 [n, 4]."""
    experts = torch.tensor([expert for expert, _, _ in landed])
    firsts = torch.searchsorted(chosen, experts).tolist()
    ends = torch.searchsorted(chosen, experts, right=True).tolist()
    rows = [
        (slot, int(low), start, min(size, end - start))
        for (_, slot, low), first, end in zip(landed, firsts, ends, strict=True)
        for start in range(first, end, size)
    ]
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)


def _numbers(layout: RecordLayout, index: int) -> dict[str, int]:
    matrix, at = layout.matrices[index], layout.offsets[index]
    biases = dict(zip([b.name for b in layout.biases], layout.bias_offsets, strict=True))
    return {
        "ROWS": matrix.rows, "COLS": matrix.cols, "GROUP": matrix.group,
        "SCALE": at.scale, "ZERO": at.zero, "HIGH": at.high, "LOW": at.low,
        "BIAS": biases.get(f"{matrix.name}_bias", -1),
    }  # fmt: skip


def _kernels() -> Any:
    from fate_moe.compute import gpu_kernels  # Triton comes with torch's builds for GPUs only

    return gpu_kernels
