"""Check everything that needs a GPU on this machine's card, and how near its ceilings it comes.

    python scripts/gpu_check.py --out gpu_check.json

Sections, each as far as the minutes last; what was left out is named:
    ceilings   copies on the card, copies from pinned memory, bf16 matrix products
    kernels    each against its definition in float64; decode against the card's copies, prefill
               against its matrix products, with experts made up in the shapes of real models
    gates      the tests of tests/gates and tests/unit/compute that run on a card
    sanitizer  the kernels' tests under compute-sanitizer, where there is one
    policies   demand, path, fate and tuned, on a made-up Qwen1.5-MoE and on each --store, over
               budgets and links, beside the bound: the fewest bytes over the link, or everything
               resident

Writes JSON as it goes and prints a table last; exits with 2 where there is no CUDA card, with 1
where a section failed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor

from fate_moe.bench.policies import Form, run_policies
from fate_moe.bench.shapes import find_shape
from fate_moe.bench.synthetic import write_store
from fate_moe.compute.eager import EagerExperts
from fate_moe.compute.gpu import GpuExperts
from fate_moe.compute.native import GateForm
from fate_moe.models.gate_form import apply_gate
from fate_moe.models.load import read_skeleton
from fate_moe.quant.codec import decode, decode_int2, encode
from fate_moe.quant.record import MatrixSpec, RecordLayout
from fate_moe.types import no_progress

ROOT = Path(__file__).parents[1]
FORM = GateForm("SILU")
SHAPE = "qwen1.5-moe-a2.7b"
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
        return x.to(self.device, dtype), ids, weights.to(self.device, dtype)

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


def kernel_seconds(run: Callable[[int], object], calls: int = 24) -> float:
    """Return the time of one of many calls that the card makes by itself, from a CUDA graph.

    Args:
        run: is given the number of the call, so that calls can read different memory.
    """
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # compiles what has to be
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            run(number)
    return seconds(graph.replay) / calls


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


def kernels(top: dict[str, float], clock: Clock) -> dict[str, object]:
    """Check each shape on the card: errors by dtype, tokens and precision; speeds."""
    found: dict[str, object] = {}
    for shape in SHAPES:
        if clock.is_over(f"kernels of {shape.name}"):
            continue
        layer = Layer(shape, "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens in (1, 5, 64):
                for low in (False, True):
                    what = f"{shape.name}, error, {dtype}, {tokens} tokens{', low' if low else ''}"
                    found[what.replace("torch.", "")] = layer.error(tokens, dtype, low)
        found |= speeds(layer, top)
    return found


def speeds(layer: Layer, top: dict[str, float]) -> dict[str, object]:
    """Measure decode and prefill of a shape; the time a call takes of the host, too."""
    shape, found = layer.shape, dict[str, object]()
    x, ids, weights = layer.step(1, torch.bfloat16)
    k, width = shape.top_k, shape.hidden
    order = torch.arange(k, dtype=torch.int32, device="cuda")
    inner, parts = x.new_empty(k, shape.inner), x.new_zeros(k, width)
    # Other experts in every call: what the card's cache holds would not count.
    tiles = [
        torch.tensor([[(k * n + i) % shape.experts, 0, i, 1] for i in range(k)], device="cuda")
        for n in range(24)
    ]
    tiles = [one.int() for one in tiles]
    spent = kernel_seconds(
        lambda n: layer.gpu._run(tiles[n], 1, order, k, x, weights.flatten(), inner, parts)
    )
    read = k * shape.layout.record_bytes
    found[f"{shape.name}, decode, s"] = spent
    found[f"{shape.name}, decode, of the copy rate"] = read / spent / top["copy_bytes_s"]
    arriving = layer.arriving(ids, low=False)
    found[f"{shape.name}, decode, s with the host"] = seconds(
        lambda: layer.gpu(x, ids, weights, arriving)
    )
    for tokens in (512, 2048):
        x, ids, weights = layer.step(tokens, torch.bfloat16)
        arriving = layer.arriving(ids, low=False)
        spent = seconds(partial(layer.gpu, x, ids, weights, arriving), 9)
        flop = tokens * shape.top_k * 6 * shape.hidden * shape.inner
        found[f"{shape.name}, {tokens} tokens, s"] = spent
        found[f"{shape.name}, {tokens} tokens, of bf16"] = flop / spent / top["bf16_flop_s"]
    return found


def gates(clock: Clock) -> dict[str, object]:
    """Run the tests that have a card to run on; returns their last line."""
    tests = ["tests/gates/test_g1_device.py", "tests/unit/compute/test_gpu.py"]
    return {"gates": pytest([], tests, clock.left_s)}


def sanitizer(clock: Clock) -> dict[str, object]:
    """Run the kernels' tests under compute-sanitizer; returns their last line."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        clock.left_out.append("sanitizer: compute-sanitizer is not installed")
        return {}
    before = [tool, "--error-exitcode", "9", "--target-processes", "all"]
    tests = ["tests/unit/compute/test_gpu.py", "-k", "order or no_expert or head"]
    return {"sanitizer": pytest(before, tests, min(120.0, clock.left_s))}


def pytest(before: list[str], tests: list[str], most_s: float) -> str:
    """Run tests on the card in a process of their own; returns what they say last."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(
            [*command, *tests], capture_output=True, text=True, check=False, cwd=ROOT,
            env=environment, timeout=most_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"failed: not over after {most_s:.0f} s"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return lines[-1] if done.returncode == 0 else f"failed: {lines[-1]}"


def policies(
    top: dict[str, float], clock: Clock, stores: Sequence[Path], note: Note
) -> dict[str, object]:
    """Measure policies cell by cell while time lasts."""
    cells = [(b, link) for b in (0.25, 0.5, 0.1, 0.75, 0.9) for link in (None, 16e9, 32e9)]
    for budget, link in cells:
        for store in stores:
            rate = "link as it is" if link is None else f"{link / 1e9:.0f} GB/s"
            what = f"{store.name}, {budget:.0%}, {rate}"
            if not clock.is_over(what):
                note(cell(store, what, budget, link, top))
    return {}


def cell(
    store: Path, what: str, budget: float, link: float | None, top: dict[str, float]
) -> dict[str, object]:
    """Measure every policy at one budget over one link."""
    form = Form(
        ("demand", "path", "fate", "tuned"), (budget,), (link,), rounds=1, prompt_tokens=512,
        new_tokens=32, warm_ups=1, raw_bytes_s=top["pinned_bytes_s"],
        settings=(("vram", "90%"), ("dtype", "bfloat16")),
    )  # fmt: skip
    words = read_skeleton(store).vocabulary
    torch.manual_seed(0)
    requests = [torch.randint(3, words, (1, form.prompt_tokens)) for _ in range(2)]
    rows = run_policies(store, requests, form, io.StringIO(), lambda row: None, no_progress)
    found: dict[str, object] = {}
    for row in rows:
        read = "" if row.prefill_tok_s is None else f"prefill {row.prefill_tok_s:.0f}, "
        wait = "" if row.stall_share is None else f", waiting {row.stall_share:.0%}"
        found[f"{what}, {row.policy}"] = f"{read}decode {row.decode_tok_s:.1f} tok/s{wait}"
    return found


class Clock:
    """How long may this take, and what was left out?"""

    def __init__(self, minutes: float) -> None:
        self._end_s = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds to go."""
        return max(1.0, self._end_s - time.monotonic())

    def is_over(self, what: str) -> bool:
        """Say whether there is no time for something, and note that it was left out."""
        over = self._end_s <= time.monotonic()
        if over:
            self.left_out.append(what)
        return over


Note = Callable[[dict[str, object]], None]
SECTIONS = ("kernels", "gates", "sanitizer", "policies")


def check(names: list[str], clock: Clock, stores: Sequence[Path], note: Note) -> None:
    """Run sections; `note` is told what is found, by what it is of, as it is found."""
    top = ceilings()
    note(dict(top))
    with TemporaryDirectory(prefix="fate-gpu-") as folder:
        made_up = Path(folder) / SHAPE
        runs: dict[str, Callable[[], dict[str, object]]] = {
            "kernels": partial(kernels, top, clock),
            "gates": partial(gates, clock),
            "sanitizer": partial(sanitizer, clock),
            "policies": partial(policies, top, clock, [made_up, *stores], note),
        }
        for name in names:
            if clock.is_over(name):
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                if name == "policies":
                    write_store(find_shape(SHAPE), made_up)
                note(runs[name]())
            except Exception as error:  # noqa: BLE001 - the other sections are worth their minutes
                traceback.print_exc()
                note({name: f"failed: {error!r:.300}"})


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="The JSON file.")
    parser.add_argument("--minutes", type=float, default=8.0, help="About how long it may take.")
    parser.add_argument(
        "--store", type=Path, action="append", default=[], help="Measure policies on it, too."
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="Sections, with commas between.")
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        print(f"gpu_check: only: {unknown[0]!r} is none of {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA card here, or torch is a CPU build", file=sys.stderr)
        return 2
    clock = Clock(asked.minutes)
    found: dict[str, object] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip

    def note(more: dict[str, object]) -> None:
        found.update(more)
        asked.out.write_text(json.dumps({**found, "left_out": clock.left_out}, indent=1))

    check(names, clock, asked.store, note)
    note({})
    rows = [*found.items(), *(("left out", what) for what in clock.left_out)]
    for name, value in rows:
        print(f"{name:58} {value:.4g}" if isinstance(value, float) else f"{name:58} {value}")
    return int(any(str(value).startswith("failed") for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
