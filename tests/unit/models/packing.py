"""Tiny FP8 and MXFP4 checkpoints, packed here by the published rules and nobody's code."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pack = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]

BLOCK = 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack_fp8(source: Path, folder: Path, block: list[int] | None = None) -> Path:
    """Copy a plain checkpoint, its linear layers in FP8 with a scale per block."""
    block = block or [BLOCK, BLOCK]

    def packed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        keep = ("embed", "norm", "lm_head", "mlp.gate.", "router", "bias")
        if tensor.dim() < 2 or any(word in name for word in keep):
            yield name, tensor
            return
        codes, scales = to_fp8(tensor.float(), block)
        yield name, codes
        yield f"{name}_scale_inv", scales

    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": block,
    }  # fmt: skip
    return _rewrite(source, folder, packed, quantization)


def pack_mxfp4(source: Path, folder: Path) -> Path:
    """Copy a plain gpt_oss checkpoint, its experts in MXFP4."""

    def packed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            yield name, tensor
            return
        blocks, scales = to_mxfp4(tensor.float().mT)
        yield f"{name}_blocks", blocks
        yield f"{name}_scales", scales

    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    return _rewrite(source, folder, packed, quantization)


def to_fp8(weight: Tensor, block: list[int]) -> tuple[Tensor, Tensor]:
    """Codes [..., rows, cols] and float32 scales, one per block, also where an edge is ragged."""
    *lead, rows, cols = weight.shape
    grid = [-(-rows // block[0]), -(-cols // block[1])]
    scales = torch.empty(*lead, *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[..., i, j] = part.abs().amax((-2, -1)).clamp(min=1e-12) / 448
    return (weight / spread(scales, block, rows, cols)).to(torch.float8_e4m3fn), scales


def spread(scales: Tensor, block: list[int], rows: int, cols: int) -> Tensor:
    """Repeat each scale over its block, by the index of each weight."""
    return scales[..., torch.arange(rows) // block[0], :][..., torch.arange(cols) // block[1]]


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [E, rows, cols / 32, 16] and scales uint8 [E, rows, cols / 32]."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).byte(), (exponents + 127).byte()


def _rewrite(source: Path, folder: Path, packed: Pack, quantization: dict[str, object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    out = dict(pair for name, tensor in tensors.items() for pair in packed(name, tensor))
    save_file(
        {name: t.contiguous() for name, t in out.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder
