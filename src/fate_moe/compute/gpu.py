"""What is the sum of a token's experts, computed on a GPU from its own slots?

The host knows who was chosen (the mover needs that anyway), sorts the choices by expert once, and
launches two kernels for all that has landed together (one token's are recorded, see `gpu_token`).
Tiles are cut from an expert's tokens alone, and parts are summed in ascending expert id, so the
result depends neither on the order of arrival nor on what is resident. See `gpu_kernels`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fate_moe.compute.eager import Arriving
from fate_moe.compute.gpu_token import OneToken
from fate_moe.compute.native import GateForm
from fate_moe.quant.record import RecordLayout

_device_of: Any = torch.cuda.device_of  # which has no types
_FEW_TOKENS = 8  # up to here each choice is a tile: weights are what is read, not tokens
_TILE_TOKENS = (16, 64)  # the least that a matrix unit takes, and what registers hold
# By tokens of a tile: R rows of the matrix, B bytes of a row's plane (four weights each) at a time.
_CUTS: dict[int, dict[str, int]] = {
    1: {"R": 8, "B": 128, "num_warps": 2},
    16: {"R": 64, "B": 32, "num_warps": 4},
    32: {"R": 64, "B": 32, "num_warps": 4},
    64: {"R": 128, "B": 64, "num_warps": 8},
}
_SUM_COLUMNS = 1024


def can_compute(layout: RecordLayout) -> bool:
    """Say whether the kernels read records of this layout: codes of 4 bits, in two planes."""
    return layout.bits == 4


def why_missing() -> str:
    """Say why the kernels cannot be had; empty if they can."""
    return "" if find_spec("triton") else "Triton is not installed"


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
        self._tokens: dict[tuple[Any, ...], OneToken] = {}

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, arriving: Arriving
    ) -> Tensor:
        """Return the weighted sum over each token's experts, [T, D]; see `EagerExperts`."""
        with _device_of(x):  # a thread has a current card of its own
            return self._sum(x, topk_ids, topk_weights, arriving)

    def _sum(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, arriving: Arriving) -> Tensor:
        (tokens, width), k = x.shape, topk_ids.shape[1]
        # Small arrays: numpy takes a fifth of the time that torch does.
        flat = topk_ids.numpy().ravel()
        by_expert = flat.argsort(kind="stable")
        chosen = flat[by_expert]
        if tokens == 1:
            return self._one_token(x, topk_weights[0], by_expert, chosen, arriving)
        places = np.empty_like(by_expert)
        places[by_expert] = np.arange(len(flat))
        # A token's choices by ascending expert lie in ascending places.
        places = np.sort(places.reshape(tokens, k), axis=1)
        order, positions = _on(x.device, by_expert, places.ravel())
        size = _tile_tokens(tokens, len(flat), 1 + int(np.count_nonzero(np.diff(chosen))))
        weights = topk_weights.flatten().contiguous()
        inner = x.new_empty(len(flat), self._inner)
        parts = x.new_zeros(len(flat), width)
        x = x.contiguous()
        for landed in arriving:
            tiles = _tiles(landed, chosen, size)
            if len(tiles):
                (on_device,) = _on(x.device, tiles)
                self._run(on_device, size, order, k, x, weights, inner, parts)
        out = torch.empty_like(x)
        self._add(parts, positions, out)
        return out

    def _one_token(
        self, x: Tensor, weights: Tensor, by_expert: NDArray[Any], chosen: NDArray[Any],
        arriving: Arriving,
    ) -> Tensor:  # fmt: skip
        k = len(weights)
        kind = k, x.dtype, weights.dtype, x.device
        if kind not in self._tokens:

            def run(
                tiles: Tensor, order: Tensor, x: Tensor, w: Tensor, inner: Tensor, parts: Tensor
            ) -> None:
                self._run(tiles, 1, order, k, x, w, inner, parts)

            self._tokens[kind] = OneToken(run, self._add, self._inner, x, weights)
        token = self._tokens[kind]
        token.begin(x, weights, by_expert)
        for landed in arriving:
            tiles = _tiles(landed, chosen, 1)
            if len(tiles):
                token.run(tiles)
        return token.end()

    def _add(self, parts: Tensor, positions: Tensor, out: Tensor) -> None:
        tokens, width = out.shape
        _kernels().sum_kernel[(tokens, -(-width // _SUM_COLUMNS))](
            parts, positions, out, K=len(parts) // tokens, D=width, B=_SUM_COLUMNS
        )

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


def _tiles(landed: Any, chosen: NDArray[Any], size: int) -> NDArray[Any]:
    """Return (slot, low, first, count) of each tile, [n, 4]."""
    experts = np.array([expert for expert, _, _ in landed])
    firsts = chosen.searchsorted(experts).tolist()
    ends = chosen.searchsorted(experts, side="right").tolist()
    rows = [
        (slot, int(low), start, min(size, end - start))
        for (_, slot, low), first, end in zip(landed, firsts, ends, strict=True)
        for start in range(first, end, size)
    ]
    return np.array(rows, dtype=np.int32).reshape(-1, 4)


def _on(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """Bring arrays to a device as int32, with one copy."""
    joined = np.concatenate([array.ravel() for array in arrays]).astype(np.int32)
    host = torch.from_numpy(joined)
    if device.type == "cuda":
        host = host.pin_memory()  # from any other memory the host would wait for what came before
    parts = torch.split(host.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


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
