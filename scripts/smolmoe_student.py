"""How is the carved model trained: which of its numbers move, and in which form?

The student is the dense model with its feed-forward blocks masked token by token, which computes
what the carved checkpoint computes, in matrices large enough to be fast. What moves: a low-rank
delta per matrix, the routers, the norms' gains. The forward pass computes with what will ship: the
deltas in the recipe's eight bits, their sum with the base in the checkpoint's bfloat16, of that the
routed experts balanced and in a store's INT4. Gradients go past all rounding (straight through), so
that the model learns with the errors it will run with.

Letters as in fate_moe.reference.recipe; T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe.quant.balance import loudness
from fate_moe.quant.quantize import MAX_CODE, quantize
from fate_moe.quant.record import choose_group
from fate_moe.reference.recipe import (
    EXPERT_WIDTH,
    NORMS,
    NUM_EXPERTS,
    ROUTER_SPREAD,
    SHARED_WIDTH,
    TOP_K,
    Delta,
    LayerRecipe,
    Recipe,
    eight_bits,
)

_NORM_MODULES = dict(zip(NORMS, ("input_layernorm", "post_attention_layernorm"), strict=True))


class _LowRankLinear(torch.autograd.Function):
    """x @ effective.T, whose gradient goes to the factors of the delta, never to a full matrix.

    Arguments: x, effective, the factors out and into, and as what both are shipped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, effective: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, effective, *factors[2:])
        return x @ effective.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, effective, out, into = ctx.saved_tensors
        rows, slope = x.flatten(0, -2), gradient.flatten(0, -2)
        for_out = slope.T @ (rows @ into.T.to(x.dtype))
        for_into = (slope @ out.to(x.dtype)).T @ rows
        factors = for_out.to(out.dtype), for_into.to(into.dtype)
        return gradient @ effective, None, *factors, None, None


class DeltaLinear(nn.Module):
    """A frozen matrix [O, I] plus a trained low-rank delta; a part of it rounded to INT4."""

    def __init__(self, base: Tensor, rank: int, routed_dim: int | None = None) -> None:
        """routed_dim: along which dimension the neurons of routed experts lie; None = no INT4.

        Who makes one sees to the device, and calls `refresh(True)` before the first forward pass.
        """
        super().__init__()
        outputs, inputs = base.shape
        self.register_buffer("base", base.detach().clone(), persistent=False)
        self.register_buffer("effective", base.detach().clone(), persistent=False)
        self.out = nn.Parameter(base.new_zeros(outputs, rank, dtype=torch.float32))
        self.into = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.register_buffer("shipped_out", torch.zeros_like(self.out.data), persistent=False)
        self.register_buffer("shipped_into", torch.zeros_like(self.into.data), persistent=False)
        self.routed_dim = routed_dim
        # The checkpoint's routed down matrices are larger: see carve_ffn.
        self.enlarged = TOP_K if routed_dim == 1 else 1
        if routed_dim is None:
            return
        rows, cols = self._routed(base).shape
        # As in a store: a row of down is one row of 32 inputs for each expert.
        self.group = choose_group("expert", EXPERT_WIDTH if routed_dim == 1 else cols)
        for name in ("scale", "zero"):
            grid = base.new_zeros(rows, cols // self.group, 1, dtype=torch.float32)
            self.register_buffer(name, grid, persistent=False)

    def _routed(self, weight: Tensor) -> Tensor:
        """View the routed experts' part of a matrix of this shape."""
        dim = self.routed_dim
        return weight.narrow(dim, SHARED_WIDTH, weight.shape[dim] - SHARED_WIDTH)

    @torch.no_grad()
    def start(self, out: Tensor, scale: Tensor, into: Tensor) -> None:
        """Begin with a recipe's delta, [O, R], [R], [R, I], of at most this rank."""
        rank, root = len(scale), scale.sqrt()  # what is shared out makes the factors alike
        self.out[:, :rank] = out * root
        self.into[:rank] = root[:, None] * into

    @torch.no_grad()
    def shipped(self) -> Tensor:
        """Return the matrix as the checkpoint holds it: base and rounded delta in bfloat16."""
        for shipped, factor, dim in (
            (self.shipped_out, self.out, 0),
            (self.shipped_into, self.into, 1),
        ):
            codes, scale = eight_bits(factor, dim)
            shipped.copy_(codes.mul_(scale))
        weight = torch.addmm(self.base.float(), self.shipped_out, self.shipped_into)
        if self.routed_dim is not None:
            self._routed(weight).mul_(self.enlarged)
        return weight.bfloat16().float()

    @torch.no_grad()
    def refresh(self, new_grid: bool, neurons: Tensor | None = None) -> None:
        """Bring the effective weights up to date.

        Args:
            new_grid: fit INT4 scales and zeros anew.
            neurons: by what the routed neurons are multiplied while they are rounded, [E * F].
        """
        weight = self.shipped()
        if self.routed_dim is not None:
            part = self._routed(weight)
            scale = torch.ones(1, 1, device=weight.device)
            if neurons is not None:
                scale = neurons[:, None] if self.routed_dim == 0 else neurons[None]
            self._round(part.mul_(scale), new_grid)
            part.div_(scale * self.enlarged)
        self.effective.copy_(weight)

    def _round(self, part: Tensor, new_grid: bool) -> None:
        if new_grid:
            fit = quantize(part.contiguous(), self.group)
            self.scale.copy_(fit.scale[..., None])
            self.zero.copy_(fit.zero[..., None])
        inverse = torch.where(self.scale == 0, 0.0, 1.0 / self.scale)  # as quantize does
        groups = part.unflatten(1, (-1, self.group))
        codes = torch.addcmul(self.zero, groups, inverse).round_().clamp_(0, MAX_CODE[4])
        part.copy_(codes.sub_(self.zero).mul_(self.scale).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.effective.dtype)
        factors = self.out, self.into, self.shipped_out, self.shipped_into
        return _LowRankLinear.apply(x, self.effective, *factors)


class CarvedBlock(nn.Module):
    """A dense feed-forward block in carved order, its unchosen experts masked out.

    After a forward pass in training mode `load` [E] holds the experts' loads (1 = an even share)
    and `balance` the load-balancing loss (Fedus et al., arXiv 2101.03961, section 2.2; 1 = even).
    """

    def __init__(self, mlp: Any, recipe: LayerRecipe, rank: int) -> None:
        super().__init__()
        order = recipe.permutation.to(mlp.gate_proj.weight.device)
        self.gate = DeltaLinear(mlp.gate_proj.weight[order], rank, 0)
        self.up = DeltaLinear(mlp.up_proj.weight[order], rank, 0)
        self.down = DeltaLinear(mlp.down_proj.weight[:, order], rank, 1)
        self.router = nn.Parameter(recipe.router.clone())
        self.load = self.balance = torch.empty(0)

    def refresh(self, new_grid: bool) -> None:
        """Bring the effective weights up to date, balanced as a store's are (quant/balance)."""
        routed = (linear.shipped()[SHARED_WIDTH:] for linear in (self.gate, self.up))
        experts = torch.cat([rows.unflatten(0, (-1, EXPERT_WIDTH)) for rows in routed], 1)
        loud = loudness(experts).flatten()
        self.gate.refresh(new_grid)
        self.up.refresh(new_grid, 1 / loud)
        self.down.refresh(new_grid, loud)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 many scores would tie
            places = self._route(x.float())
        hidden = F.silu(self.gate(x)) * self.up(x)
        routed = hidden[..., SHARED_WIDTH:].unflatten(-1, (NUM_EXPERTS, EXPERT_WIDTH))
        routed = (routed * places.to(hidden.dtype)[..., None]).flatten(-2)
        return self.down(torch.cat([hidden[..., :SHARED_WIDTH], routed], -1))

    def _route(self, x: Tensor) -> Tensor:
        """Weight of every expert, [..., E] float32, zero where not chosen; x [..., D] float32."""
        scores = x @ self.router.T
        best = scores.topk(TOP_K, dim=-1)
        weights = torch.softmax(best.values * ROUTER_SPREAD, -1) * TOP_K
        places = torch.zeros_like(scores).scatter(-1, best.indices, weights)
        if self.training:
            chosen = (places.detach() > 0).flatten(0, -2).float().mean(0)
            self.load = chosen * (NUM_EXPERTS / TOP_K)
            share = torch.softmax(scores.flatten(0, -2), -1).mean(0)
            self.balance = (self.load * share).sum()
        return places


def make_student(
    dense: Any, recipe: Recipe, rank: int, attention_rank: int, dtype: torch.dtype
) -> Any:
    """Return the student, begun at `recipe`, its large products in `dtype`, on dense's device.

    Its effective weights are the dense ones until `refresh(student, True)`.

    Raises:
        SystemExit: a delta of the recipe does not fit into its rank.
    """
    for name, delta in recipe.deltas.items():
        have, option = delta.scale.shape[-1], "attention-rank" if name in "qkvo" else "rank"
        room = attention_rank if name in "qkvo" else rank
        if have > room:
            raise SystemExit(f"start recipe: delta of {name} has rank {have}, --{option} is {room}")
    student = copy.deepcopy(dense).requires_grad_(False)
    for index, layer in enumerate(student.model.layers):
        start = recipe.layer(index)
        layer.mlp = CarvedBlock(layer.mlp, start, rank)
        for name in "qkvo":
            base = getattr(layer.self_attn, f"{name}_proj").weight
            setattr(layer.self_attn, f"{name}_proj", DeltaLinear(base, attention_rank))
        for name, delta in recipe.deltas.items():
            factors = delta.out[index], delta.scale[index], delta.into[index]
            _matrix(layer, name).start(*factors)
        for name, path in _NORM_MODULES.items():
            gain = getattr(layer, path).weight.requires_grad_(True)
            if name in recipe.norms:
                gain.data.copy_(recipe.norms[name][index])
    student.model.norm.weight.requires_grad_(True)
    if "norm" in recipe.norms:
        student.model.norm.weight.data.copy_(recipe.norms["norm"])
    for linear in deltas_of(student):
        linear.effective = linear.effective.to(dtype)
    return student.to(dense.device)  # what came from the recipe, or by chance, was made on the CPU


def _matrix(layer: Any, name: str) -> DeltaLinear:
    home = layer.mlp if name in ("gate", "up", "down") else layer.self_attn
    found: DeltaLinear = getattr(home, name if home is layer.mlp else f"{name}_proj")
    return found


def deltas_of(student: nn.Module) -> Iterator[DeltaLinear]:
    """Yield every matrix with a delta."""
    return (module for module in student.modules() if isinstance(module, DeltaLinear))


def refresh(student: Any, new_grid: bool) -> None:
    """Bring all effective weights up to date; `new_grid` fits INT4 scales and zeros anew."""
    for layer in student.model.layers:
        layer.mlp.refresh(new_grid)
        for name in "qkvo":
            _matrix(layer, name).refresh(new_grid)


def digest_of(recipe: Recipe) -> str:
    """Return a hash of everything a recipe holds."""
    tensors = {"permutation": recipe.permutation, "router": recipe.router, **recipe.norms}
    for name, delta in recipe.deltas.items():
        tensors |= {f"{name}.out": delta.out, f"{name}.scale": delta.scale}
        tensors[f"{name}.into"] = delta.into
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def recipe_of(student: Any, start: Recipe) -> Recipe:
    """Return what the student has become, rounded as it ships."""
    layers = student.model.layers
    deltas = {}
    for name in ("gate", "up", "down", "q", "k", "v", "o"):
        factors = [_matrix(layer, name) for layer in layers]
        deltas[name] = Delta.of(
            torch.stack([factor.out.detach().float().cpu() for factor in factors]),
            torch.stack([factor.into.detach().float().cpu() for factor in factors]),
        )
    norms = {
        name: torch.stack([getattr(layer, path).weight.detach().float().cpu() for layer in layers])
        for name, path in _NORM_MODULES.items()
    }
    norms["norm"] = student.model.norm.weight.detach().float().cpu()
    router = torch.stack([layer.mlp.router.detach().half().cpu() for layer in layers])
    return Recipe(start.permutation, router, deltas, norms)
