"""Check the GPU's kernels on this machine's card: how exact, and how near its ceilings?

    python scripts/gpu_check.py --out gpu_check.json

Experts are made up in the shapes of real models. Each kernel is held against the definition in
float64; decode against the card's own copies, prefill against its bf16 matrix product, measured in
the same run. Prints a table and writes JSON; exits with 2 where there is no CUDA card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fate_moe.compute.eager import EagerExperts
from fate_moe.compute.gpu import GpuExperts
from fate_moe.compute.native import GateForm
from fate_moe.models.gate_form import apply_gate
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.record import MatrixSpec, RecordLayout

FORM = GateForm("SILU")
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """One MoE layer: D, F, experts, experts a token."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def layout(self) -> RecordLayout:
        """Of one expert's record."""
        up = MatrixSpec("gate_up_proj", 2 * self.inner, self.hidden, 64)
        return RecordLayout((up, MatrixSpec("down_proj", self.hidden, self.inner, 64)))


SHAPES = (
    Shape("Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
)


class Layer:
    """Made-up experts of a shape in slots on a device, by both paths."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device, layout = shape, device, shape.layout
        torch.manual_seed(0)
        some = [encode(layout, self._weights(), fitted=False) for _ in range(4)]
        order = [some[e % len(some)] for e in range(shape.experts)]
        self.slots = torch.stack(order).to(device)
        self.gpu = GpuExperts(layout, FORM, self.slots)
        self.exact = EagerExperts(
            lambda record, dtype: decode(layout, record, dtype),
            lambda weights, x: (
                apply_gate(FORM, x @ weights["gate_up_proj"].T) @ weights["down_proj"].T
            ),
            lambda slot: self.slots[slot],
            lambda record, dtype: decode_int2(layout, record, dtype),
        )

    def _weights(self) -> dict[str, Tensor]:
        return {
            m.name: torch.randn(m.rows, m.cols) / m.cols**0.5 for m in self.shape.layout.matrices
        }

    def step(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Make tokens [T, D] and their routing."""
        weights, ids = torch.rand(tokens, self.shape.experts).topk(self.shape.top_k)
        x = torch.randn(tokens, self.shape.hidden)
        return x.to(self.device, dtype), ids.to(self.device), weights.to(self.device, dtype)

    def arriving(self, ids: Tensor, low: bool) -> list[list[tuple[int, int, bool]]]:
        """All experts of a step at once, every second one from its head if `low`."""
        return [[(e, e, low and e % 2 == 1) for e in ids.unique().tolist()]]

    def error(self, tokens: int, dtype: torch.dtype, low: bool) -> float:
        """Return how far the kernels are from float64, relative to the norm."""
        x, ids, weights = self.step(tokens, dtype)
        arriving = self.arriving(ids, low)
        have = self.gpu(x, ids, weights, arriving).double()
        want = self.exact(x.double(), ids, weights.double(), arriving)
        return float((have - want).norm() / want.norm())


def seconds(run: Callable[[], object], times: int = 30) -> float:
    """Return the median time of a call on the card."""
    for _ in range(3):
        run()
    spent = []
    for _ in range(times):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        spent.append(began.elapsed_time(ended) / 1e3)
    return sorted(spent)[times // 2]


def ceilings() -> dict[str, float]:
    """Measure the card: bytes/s of a copy (read and written), from pinned memory; bf16 FLOP/s."""
    here = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    there, pinned = (
        torch.empty_like(here),
        torch.empty(GIB // 4, dtype=torch.uint8, pin_memory=True),
    )
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    return {
        "copy_bytes_s": 2 * GIB / seconds(lambda: there.copy_(here)),
        "pinned_bytes_s": GIB / 4 / seconds(lambda: here[: GIB // 4].copy_(pinned, True), 9),
        "bf16_flop_s": 2 * 4096**3 / seconds(lambda: a @ a),
    }


def measure(shape: Shape, top: dict[str, float]) -> dict[str, object]:
    """Check one shape on the card."""
    layer, found = Layer(shape, "cuda"), dict[str, object](asdict(shape))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (1, 5, 64, 512):
            for low in (False, True):
                key = f"error {dtype} {tokens} tokens{' low' if low else ''}".replace("torch.", "")
                found[key] = layer.error(tokens, dtype, low)
    for tokens in (1, 512):
        x, ids, weights = layer.step(tokens, torch.bfloat16)
        arriving = layer.arriving(ids, low=False)
        spent = seconds(lambda: layer.gpu(x, ids, weights, arriving))  # noqa: B023
        read = len(arriving[0]) * shape.layout.record_bytes
        flop = tokens * shape.top_k * 6 * shape.hidden * shape.inner
        found |= {
            f"{tokens} tokens, s": spent,
            f"{tokens} tokens, of the copy rate": read / spent / top["copy_bytes_s"],
            f"{tokens} tokens, of bf16": flop / spent / top["bf16_flop_s"],
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="The JSON file.")
    out: Path = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA card here, or torch is a CPU build", file=sys.stderr)
        return 2
    top = ceilings()
    shapes = [measure(shape, top) for shape in SHAPES]
    card = torch.cuda.get_device_name()
    out.write_text(json.dumps({"card": card, "torch": torch.__version__, **top, "shapes": shapes}))
    for name, value in [("card", card), *top.items(), *(i for s in shapes for i in s.items())]:
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
