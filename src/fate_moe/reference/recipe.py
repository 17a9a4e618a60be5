"""How does one dense feed-forward block become a shared expert and 24 routed ones?

A recipe says, per layer, which neurons go where (`permutation`), how the router scores the experts
(`router`), and how the shared expert makes up for what the unchosen experts would have added
(`correction`, a low-rank change of its down projection). Nothing else of the base model changes:
with every expert chosen and no correction the carved block equals the dense one.

Shape letters: L layers, D hidden, E experts, F expert width, N dense width, S shared width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe.errors import FormatError

NUM_LAYERS = 30
HIDDEN_SIZE = 576
NUM_EXPERTS = 24
TOP_K = 6
EXPERT_WIDTH = 32
SHARED_WIDTH = 768
DENSE_WIDTH = SHARED_WIDTH + NUM_EXPERTS * EXPERT_WIDTH

ROUTER_SPREAD = 2.0**-9
"""Standard deviation of the router logits in the checkpoint. The recipe's router has a spread of
one; so small a spread makes the softmax over the chosen experts nearly uniform, as it has to be for
experts which are plain slices of one dense block. A power of two: no rounding."""

SHARED_EXPERT_GATE = 0.5
"""What the checkpoint's all-zero shared_expert_gate multiplies the shared expert's output with."""


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """One layer's carving.

    Attributes:
        permutation: [N] int64, dense neuron of each carved place: first the S of the shared expert,
            then expert by expert.
        router: [E, D], scores with unit spread.
        correction: [D, S] added to the shared expert's part of the down projection, or None.
    """

    permutation: Tensor
    router: Tensor
    correction: Tensor | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The carving of all layers, as stored.

    Attributes:
        permutation: [L, N] int16.
        router: [L, E, D] float16, unit spread.
        correction_out: [L, D, R] int8.
        correction_scale: [L, R] float32.
        correction_in: [L, R, S] int8.
    """

    permutation: Tensor
    router: Tensor
    correction_out: Tensor
    correction_scale: Tensor
    correction_in: Tensor

    def layer(self, index: int) -> LayerRecipe:
        """Return one layer's carving in float32, the correction multiplied out."""
        out = self.correction_out[index].float() * self.correction_scale[index]  # [D, R]
        return LayerRecipe(
            permutation=self.permutation[index].long(),
            router=self.router[index].float(),
            correction=out @ self.correction_in[index].float(),
        )

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the recipe as one safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in self.__slots__}
        save_file(tensors, path, metadata=metadata)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        FormatError: a tensor is missing or has the wrong shape or type, or a layer's permutation
            is none.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a readable recipe ({error}); reinstall fate-moe") from error
    rank = tensors["correction_scale"].shape[-1] if "correction_scale" in tensors else 0
    want = {
        "permutation": (torch.int16, (NUM_LAYERS, DENSE_WIDTH)),
        "router": (torch.float16, (NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE)),
        "correction_out": (torch.int8, (NUM_LAYERS, HIDDEN_SIZE, rank)),
        "correction_scale": (torch.float32, (NUM_LAYERS, rank)),
        "correction_in": (torch.int8, (NUM_LAYERS, rank, SHARED_WIDTH)),
    }
    have = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if have != want:
        raise FormatError(f"{path}: not a smolmoe recipe: has {have}, needs {want}")
    places = torch.arange(DENSE_WIDTH, dtype=torch.int16).expand(NUM_LAYERS, -1)
    if not torch.equal(tensors["permutation"].sort(dim=-1).values, places):
        raise FormatError(f"{path}: permutation does not hold every neuron once per layer")
    return Recipe(**tensors)


def carve_ffn(gate: Tensor, up: Tensor, down: Tensor, recipe: LayerRecipe) -> dict[str, Tensor]:
    """Rearrange one dense feed-forward block into the tensors of a Qwen2-MoE block.

    The sizes follow from the recipe: E from the router, S from the correction when there is one,
    else half of N.

    Args:
        gate: [N, D].
        up: [N, D].
        down: [D, N].
        recipe: the layer's carving.
    Returns:
        Tensors by their checkpoint name below `mlp.`, in the dtype of the dense weights. The shared
        expert's down projection is divided by what the all-zero shared_expert_gate makes of it; the
        routed ones are multiplied by the number of experts which share the weight one (TOP_K).
    Source: shared + routed split after CMoE (arXiv 2502.04416); the low-rank correction is ours.
    """
    num_experts = recipe.router.shape[0]
    width = gate.shape[0]
    shared = width // 2 if recipe.correction is None else recipe.correction.shape[1]
    gate, up = gate[recipe.permutation], up[recipe.permutation]
    down = down[:, recipe.permutation]
    shared_down = down[:, :shared]
    if recipe.correction is not None:
        shared_down = shared_down + recipe.correction.to(down.dtype)
    tensors = {
        "gate.weight": (recipe.router * ROUTER_SPREAD).to(gate.dtype),
        "shared_expert_gate.weight": gate.new_zeros(1, gate.shape[1]),
        "shared_expert.gate_proj.weight": gate[:shared],
        "shared_expert.up_proj.weight": up[:shared],
        "shared_expert.down_proj.weight": shared_down / SHARED_EXPERT_GATE,
    }
    expert_width = (width - shared) // num_experts
    for expert in range(num_experts):
        first = shared + expert * expert_width
        rows = slice(first, first + expert_width)
        tensors[f"experts.{expert}.gate_proj.weight"] = gate[rows]
        tensors[f"experts.{expert}.up_proj.weight"] = up[rows]
        tensors[f"experts.{expert}.down_proj.weight"] = down[:, rows] * TOP_K
    return tensors
