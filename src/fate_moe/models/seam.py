"""How does a transformers model come to call our experts instead of its own?

transformers v5 routes every decorated family through one experts class per family, whose forward
gets (tokens, topk_ids, topk_weights). While the model is being built, that class is replaced in its
module by a subclass without parameters, so no expert is ever allocated or read; everything else,
attention, norms, routers, shared experts, is transformers' own code.

Invariants: the classes are put back whatever happens; a family without such a class is a
ModelError, never a silent fall-back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe.errors import ModelError
from fate_moe.quant.balance import BALANCED

_swapping = threading.Lock()  # the class tables of transformers belong to the whole process

Forward = Callable[..., Tensor]
"""(tokens, topk_ids, topk_weights) -> their experts' sum; `beside` as in `MoELayer.forward`."""

UNDECORATED = ("Step3p7Experts",)
"""Experts classes with the interface's contract that transformers has not put on it."""


def is_experts(module: nn.Module) -> bool:
    """Say whether a module is a family's experts class (of the experts interface)."""
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return True
    return any(cls.__name__ in UNDECORATED for cls in type(module).__mro__)


def is_linear_in_up(module: nn.Module) -> bool:
    """Say whether experts compute act(gate) * up and nothing else between their two matrices."""
    gating = getattr(getattr(type(module), "_apply_gate", None), "__name__", "")
    return (
        gating == "_default_apply_gate"
        and bool(module.has_gate)
        and {name for name, _ in module.named_parameters(recurse=False)} == set(BALANCED)
    )


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules of a model by path, in model order.

    A model with experts of several kinds in each layer (for text and for images) has all of the
    first kind first: what follows a module is what runs after it.
    """
    found = {path: module for path, module in model.named_modules() if is_experts(module)}
    kinds = list(dict.fromkeys(_kind(path) for path in found))
    return dict(sorted(found.items(), key=lambda item: kinds.index(_kind(item[0]))))


def _kind(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdecimal())


@contextmanager
def experts_left_out(skeleton: nn.Module) -> Iterator[None]:
    """Within the scope, models of the skeleton's family are built without routed experts.

    Args:
        skeleton: the model on the meta device, built outside the scope.
    Source: the scoped class swap; the experts contract is transformers/integrations/moe.py.
    """
    classes = {type(module) for module in find_experts(skeleton).values()}
    homes = [(sys.modules[cls.__module__], cls) for cls in classes]
    with _swapping:
        try:
            for home, cls in homes:
                setattr(home, cls.__name__, _without_parameters(cls))
            yield
        finally:
            for home, cls in homes:
                setattr(home, cls.__name__, cls)


def _without_parameters(original: type[nn.Module]) -> type[nn.Module]:
    """Derive a class that builds no weights and forwards to whoever is attached."""

    class OffloadedExperts(original):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                super().__init__(config, *args, **kwargs)
            for name in list(self._parameters):
                del self._parameters[name]
                # Some families' initialisation names the weights: an empty tensor stands in.
                setattr(self, name, _nothing())
            # transformers would otherwise initialise the missing weights.
            self._is_hf_initialized = True
            self.attached: Forward | None = None

        def forward(
            self,
            hidden_states: Tensor,
            top_k_index: Tensor,
            top_k_weights: Tensor,
            **beside: Callable[[], None],
        ) -> Any:
            if self.attached is None:
                raise ModelError("the experts of this model are not attached to an engine")
            return self.attached(hidden_states, top_k_index, top_k_weights, **beside)

    def _nothing() -> Tensor:
        empty = torch.empty(0)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        return empty

    OffloadedExperts.__name__ = OffloadedExperts.__qualname__ = f"Offloaded{original.__name__}"
    return OffloadedExperts


@dataclass(frozen=True, slots=True)
class AskableRouter:
    """A layer's own router, called without its hooks. See `predict.Router`.

    Attributes:
        module: the router.
        num_experts: E; a router may name an id from E on, which means no expert.
        constants: what its block hands it beside the gate input, such as a correction bias.
        batched: it takes [B, T, D].
    """

    module: nn.Module
    num_experts: int
    constants: tuple[Tensor, ...] = ()
    batched: bool = False

    def __call__(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        gate_input = gate_input[None] if self.batched else gate_input
        scores, _, topk_ids, *_ = self.module.forward(gate_input, *self.constants)
        if scores.shape[1] > self.num_experts:
            scores = scores[:, : self.num_experts]
            topk_ids = scores.topk(topk_ids.shape[1]).indices
        return scores, topk_ids


@dataclass(frozen=True, slots=True)
class MoESite:
    """One place in the model where routed experts are computed.

    Attributes:
        path: module path of the experts.
        experts: the module, an `OffloadedExperts`.
        router: the router module that feeds it, None when the family hides it.
        num_experts: E.
        askable: the same router as a predictor may use it, None when it needs more than x.
        layer: the decoder layer that the experts are in, None when the path names none.
    """

    path: str
    experts: nn.Module
    router: nn.Module | None
    num_experts: int
    askable: AskableRouter | None
    layer: nn.Module | None

    def attach(self, forward: Forward, before_router: Callable[[Tensor], None]) -> None:
        """Let the model call `forward` for its experts, `before_router` with gate inputs."""
        self.experts.attached = forward  # type: ignore[assignment]
        if self.router is not None:
            hook = _gate_input_hook(before_router)
            self.router.register_forward_pre_hook(hook, with_kwargs=True)

    def after_router(self, hook: Callable[..., Any]) -> None:
        """Let the model hand what the router returns to a forward hook, which may change it."""
        if self.router is not None:
            self.router.register_forward_hook(hook)

    def watch_layer(self, before_layer: Callable[[Tensor], None]) -> None:
        """Let the model call `before_layer` with what enters the decoder layer, [.., D]."""
        if self.layer is not None:
            hook = _gate_input_hook(before_layer)
            self.layer.register_forward_pre_hook(hook, with_kwargs=True)

    def math(self, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Run one expert's feed-forward on tokens [n, D] as the family defines it."""
        module: Any = self.experts
        has_gate = getattr(module, "has_gate", True)
        transposed = getattr(module, "is_transposed", False)
        up = _linear(tokens, weights, "gate_up_proj" if has_gate else "up_proj", transposed)
        inner = module._apply_gate(up) if has_gate else module.act_fn(up)
        out = _linear(inner, weights, "down_proj", transposed)
        has_norm = getattr(module, "has_post_expert_norm", False)
        return module.post_expert_norm(out) if has_norm else out


def find_sites(
    model: nn.Module, hidden: int, dtype: torch.dtype, device: torch.device
) -> list[MoESite]:
    """Return the MoE sites of a model built with its experts left out, in model order.

    Args:
        hidden: D, to try each router with one token.
        dtype, device: of the model's activations.
    """
    token = torch.zeros(1, hidden, dtype=dtype, device=device)
    sites = []
    for path, experts in find_experts(model).items():
        block = model.get_submodule(path.rpartition(".")[0])
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        askable = None
        if isinstance(router, nn.Module):
            constants = _constants(router, block)
            ways = [AskableRouter(router, num_experts, constants, way) for way in (False, True)]
            askable = next((way for way in ways if _answers(way, token)), None)
        layer = _decoder_layer(model, path)
        sites.append(MoESite(path, experts, router, num_experts, askable, layer))
    return sites


def _decoder_layer(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a path that ends with its first number, such as model.layers.3."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else model.get_submodule(".".join(parts[: number + 1]))


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str, transposed: bool) -> Tensor:
    # The last bits of a product depend on how the matrix lies in memory: as in the family's own.
    weight = weights[name]
    y = x @ weight.mT.contiguous() if transposed else F.linear(x, weight)
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _gate_input_hook(
    before_router: Callable[[Tensor], None],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before_router(args[0] if args else next(iter(kwargs.values())))

    return hook


def _constants(router: nn.Module, block: nn.Module) -> tuple[Tensor, ...]:
    """Find what a router must be given beside its gate input, under the same name in its block."""
    found = []
    for name in list(signature(router.forward).parameters)[1:]:
        value = getattr(block, name, None)
        if not isinstance(value, Tensor):
            break
        found.append(value)
    return tuple(found)


@torch.no_grad()
def _answers(router: AskableRouter, token: Tensor) -> bool:
    # Families differ in what a router takes and returns; asking is safer than a list of names.
    try:
        scores, topk_ids = router(token)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    fits = scores.ndim == topk_ids.ndim == 2 and not topk_ids.is_floating_point()
    return fits and scores.shape == (1, router.num_experts) and len(topk_ids) == 1
