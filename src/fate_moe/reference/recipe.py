"""How does one dense model become a Mixture of Experts: what changes in each layer?

A recipe says, per layer, which neurons go where (`permutation`), how the router scores the experts
(`router`), and what training changed: a low-rank delta per weight matrix and the norms' gains. The
embedding is the base model's own. With every expert chosen and no delta the carved block equals
the dense one.

Shape letters: L layers, D hidden, E experts, F expert width, N dense width, S shared width, R rank,
O and I outputs and inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe.errors import FormatError

NUM_LAYERS = 30
HIDDEN_SIZE = 576
KEY_VALUE_SIZE = 192
NUM_EXPERTS = 24
TOP_K = 6
EXPERT_WIDTH = 32
SHARED_WIDTH = 768
DENSE_WIDTH = SHARED_WIDTH + NUM_EXPERTS * EXPERT_WIDTH

ROUTER_SPREAD = 2.0**-5
"""Standard deviation that a fresh recipe's router logits get in the checkpoint; in the recipe it
is one. So small a spread keeps the softmax over the chosen experts nearly uniform, as it has to be
for experts which are slices of one dense block, and leaves training a slope. A power of two: no
rounding."""

SHARED_EXPERT_GATE = 0.5
"""What the checkpoint's all-zero shared_expert_gate multiplies the shared expert's output with."""

MATRICES = {
    "gate": (DENSE_WIDTH, HIDDEN_SIZE),
    "up": (DENSE_WIDTH, HIDDEN_SIZE),
    "down": (HIDDEN_SIZE, DENSE_WIDTH),
    "q": (HIDDEN_SIZE, HIDDEN_SIZE),
    "k": (KEY_VALUE_SIZE, HIDDEN_SIZE),
    "v": (KEY_VALUE_SIZE, HIDDEN_SIZE),
    "o": (HIDDEN_SIZE, HIDDEN_SIZE),
}
"""[O, I] of every matrix that may have a delta; the first three in carved order of the neurons."""

NORMS = ("input_norm", "post_attention_norm")
_PARTS = ("out", "scale", "into")
_MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class Delta:
    """A low-rank change of one matrix in every layer, in 8 bits: out * scale @ into.

    Attributes:
        out: [L, O, R] int8.
        scale: [L, R] float32.
        into: [L, R, I] int8.
    """

    out: Tensor
    scale: Tensor
    into: Tensor

    def layer(self, index: int) -> Tensor:
        """Return one layer's change, [O, I] float32."""
        return (self.out[index].float() * self.scale[index]) @ self.into[index].float()

    @classmethod
    def of(cls, out: Tensor, into: Tensor) -> Delta:
        """Round two factors, [L, O, R] and [L, R, I], to eight bits per rank."""
        out_codes, out_scale = eight_bits(out, 1)
        into_codes, into_scale = eight_bits(into, 2)
        return cls(
            out_codes.to(torch.int8),
            (out_scale[:, 0] * into_scale[..., 0]).float(),
            into_codes.to(torch.int8),
        )


def eight_bits(factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return codes -127..127, still floats, and their scale: the largest along `dim`, over 127."""
    scale = factor.abs().amax(dim, keepdim=True).clamp_min(1e-12) / 127
    return (factor / scale).round(), scale


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """One layer's carving.

    Attributes:
        permutation: [N] int64, dense neuron of each carved place: first the S of the shared expert,
            then expert by expert.
        router: [E, D], scores with unit spread.
        shared_width: S.
        deltas: change [O, I] of a matrix by its name in MATRICES; a matrix without one stays.
    """

    permutation: Tensor
    router: Tensor
    shared_width: int
    deltas: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The carving of all layers, as stored.

    Attributes:
        permutation: [L, N] int16.
        router: [L, E, D] float16, unit spread before training.
        deltas: by name in MATRICES.
        norms: by name in NORMS [L, D], and `norm` [D], the last one: float32; empty = unchanged.
    """

    permutation: Tensor
    router: Tensor
    deltas: Mapping[str, Delta]
    norms: Mapping[str, Tensor]

    def layer(self, index: int) -> LayerRecipe:
        """Return one layer's carving in float32, the deltas multiplied out."""
        return LayerRecipe(
            permutation=self.permutation[index].long(),
            router=self.router[index].float(),
            shared_width=SHARED_WIDTH,
            deltas={name: delta.layer(index) for name, delta in self.deltas.items()},
        )

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the recipe as one safetensors file."""
        tensors = {"permutation": self.permutation, "router": self.router, **self.norms}
        for name, delta in self.deltas.items():
            tensors |= {f"{name}.{part}": getattr(delta, part) for part in _PARTS}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", **metadata})


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        FormatError: a tensor is missing, unknown, not finite, or has the wrong shape or type, or a
            layer's permutation is none.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a readable recipe ({error}); reinstall fate-moe") from error
    _check(path, tensors)
    deltas = {
        name: Delta(*(tensors[f"{name}.{part}"] for part in _PARTS))
        for name in MATRICES
        if f"{name}.scale" in tensors
    }
    norms = {name: tensors[name] for name in (*NORMS, "norm") if name in tensors}
    return Recipe(tensors["permutation"], tensors["router"], deltas, norms)


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "permutation": (torch.int16, (NUM_LAYERS, DENSE_WIDTH)),
        "router": (torch.float16, (NUM_LAYERS, NUM_EXPERTS, HIDDEN_SIZE)),
    }
    for name in {key.partition(".")[0] for key in tensors} & MATRICES.keys():
        outputs, inputs = MATRICES[name]
        scale = tensors.get(f"{name}.scale", torch.empty(0))
        rank = scale.shape[-1] if scale.dim() else 0
        if not 0 < rank <= _MAX_RANK:
            raise FormatError(f"{path}: delta of {name} has rank {rank}, need 1 to {_MAX_RANK}")
        want[f"{name}.out"] = (torch.int8, (NUM_LAYERS, outputs, rank))
        want[f"{name}.scale"] = (torch.float32, (NUM_LAYERS, rank))
        want[f"{name}.into"] = (torch.int8, (NUM_LAYERS, rank, inputs))
    if tensors.keys() & {*NORMS, "norm"}:
        want |= dict.fromkeys(NORMS, (torch.float32, (NUM_LAYERS, HIDDEN_SIZE)))
        want["norm"] = (torch.float32, (HIDDEN_SIZE,))
    have = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    if wrong:
        name = wrong[0]
        raise FormatError(
            f"{path}: not a smolmoe recipe: {name:.80} has {have.get(name)}, needs {want.get(name)}"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise FormatError(f"{path}: holds NaN or infinity; reinstall fate-moe")
    places = torch.arange(DENSE_WIDTH, dtype=torch.int16).expand(NUM_LAYERS, -1)
    if not torch.equal(tensors["permutation"].sort(dim=-1).values, places):
        raise FormatError(f"{path}: permutation does not hold every neuron once per layer")


def carve_ffn(gate: Tensor, up: Tensor, down: Tensor, recipe: LayerRecipe) -> dict[str, Tensor]:
    """Rearrange one dense feed-forward block into the tensors of a Qwen2-MoE block.

    Args:
        gate: [N, D].
        up: [N, D].
        down: [D, N].
        recipe: the layer's carving; E follows from its router.
    Returns:
        Tensors by their checkpoint name below `mlp.`, in the dtype of the dense weights. The shared
        expert's down projection is divided by what the all-zero shared_expert_gate makes of it; the
        routed ones are multiplied by the number of experts which share the weight one (TOP_K).
    Source: shared + routed split after CMoE (arXiv 2502.04416); the low-rank deltas are ours.
    """
    num_experts, shared = recipe.router.shape[0], recipe.shared_width
    order, width = recipe.permutation, gate.shape[0]
    gate = changed(gate[order], recipe, "gate")
    up = changed(up[order], recipe, "up")
    down = changed(down[:, order], recipe, "down")
    tensors = {
        "gate.weight": (recipe.router * ROUTER_SPREAD).to(gate.dtype),
        "shared_expert_gate.weight": gate.new_zeros(1, gate.shape[1]),
        "shared_expert.gate_proj.weight": gate[:shared],
        "shared_expert.up_proj.weight": up[:shared],
        "shared_expert.down_proj.weight": down[:, :shared] / SHARED_EXPERT_GATE,
    }
    expert_width = (width - shared) // num_experts
    for expert in range(num_experts):
        first = shared + expert * expert_width
        rows = slice(first, first + expert_width)
        tensors[f"experts.{expert}.gate_proj.weight"] = gate[rows]
        tensors[f"experts.{expert}.up_proj.weight"] = up[rows]
        tensors[f"experts.{expert}.down_proj.weight"] = down[:, rows] * TOP_K
    return tensors


def changed(weight: Tensor, recipe: LayerRecipe, name: str) -> Tensor:
    """Return a matrix with its delta, if it has one."""
    delta = recipe.deltas.get(name)
    return weight if delta is None else weight + delta.to(weight.dtype)
