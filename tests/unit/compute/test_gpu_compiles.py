"""The GPU's kernels compile for a real card; no card is needed for that."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fate_moe.compute import gpu, gpu_kernels
from fate_moe.compute.native import GateForm
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout

ALIGNED = "slots tiles order x out weights inner parts slot_bytes".split()


def build(kernel, constants, dtype, warps):
    kinds = {"slots": "*u8", "tiles": "*i32", "order": "*i32", "positions": "*i32"}
    kinds |= {"slot_bytes": "i32", "K": "i32", "weights": "*fp32"}
    names, signature, aligned = kernel.arg_names, {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = kinds.get(name, f"*{dtype}")
        if name in ALIGNED:
            aligned[index,] = [["tt.divisibility", 16]]
    numbers = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, numbers, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert len(done.asm["cubin"]) > 1000
    return done


def check(form, group, dtype, biases=()):
    up = MatrixSpec("gate_up_proj" if form.gated else "up_proj", 256, 128, group)
    inner = 128 if form.gated else 256
    layout = RecordLayout((up, MatrixSpec("down_proj", 128, inner, group)), biases)
    slots = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    experts = gpu.GpuExperts(layout, form, slots)
    for tokens, cut in gpu._CUTS.items():
        sizes = {"M": tokens, "R": cut["R"], "B": cut["B"]}
        up_done = build(
            gpu_kernels.up_kernel, experts._up | experts._form | sizes, dtype, cut["num_warps"]
        )
        if tokens == 1 and group == 64:
            # Planes come in 16 bytes at a time, or the kernel reads a third of what it could.
            assert "ld.global" in up_done.asm["ptx"] and ".v4.b32" in up_done.asm["ptx"]
        build(gpu_kernels.down_kernel, experts._down | sizes, dtype, cut["num_warps"])
    build(gpu_kernels.sum_kernel, {"K": 4, "D": 128, "B": 1024}, dtype, 4)


check(GateForm("SILU"), 64, "bf16")
check(GateForm("GELU", limit=1.0), 32, "fp32", (BiasSpec("down_proj_bias", 128),))
check(GateForm("RELU2", gated=False), 64, "fp16")
check(GateForm("GELU_TANH", interleaved=True, limit=2.0, limit_after=True), 64, "bf16")
"""


def test_every_kernel_compiles_for_a_card() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
