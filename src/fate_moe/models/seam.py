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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fate_moe.errors import ModelError

_swapping = threading.Lock()  # the class tables of transformers belong to the whole process

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def is_experts(module: nn.Module) -> bool:
    """Say whether a module is a family's experts class (of the experts interface)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts modules of a model by path, in model order."""
    return {path: module for path, module in model.named_modules() if is_experts(module)}


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
            # transformers would otherwise initialise the missing weights.
            self._is_hf_initialized = True
            self.attached: Forward | None = None

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            if self.attached is None:
                raise ModelError("the experts of this model are not attached to an engine")
            return self.attached(hidden_states, top_k_index, top_k_weights)

    OffloadedExperts.__name__ = OffloadedExperts.__qualname__ = f"Offloaded{original.__name__}"
    return OffloadedExperts


@dataclass(frozen=True, slots=True)
class AskableRouter:
    """A layer's own router, called without its hooks. See `predict.Router`."""

    module: nn.Module
    num_experts: int

    def __call__(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        scores, _, topk_ids = self.module.forward(gate_input)
        return scores, topk_ids


@dataclass(frozen=True, slots=True)
class MoESite:
    """One place in the model where routed experts are computed.

    Attributes:
        path: module path of the experts.
        experts: the module, an `OffloadedExperts`.
        router: the router module that feeds it, None when the family hides it.
        askable: the same router as a predictor may use it, None when it needs more than x.
    """

    path: str
    experts: nn.Module
    router: nn.Module | None
    askable: AskableRouter | None

    def attach(self, forward: Forward, before_router: Callable[[Tensor], None]) -> None:
        """Let the model call `forward` for its experts, and `before_router` with gate inputs."""
        self.experts.attached = forward  # type: ignore[assignment]
        if self.router is not None:
            self.router.register_forward_pre_hook(_gate_input_hook(before_router))

    def math(self, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Run one expert's feed-forward on tokens [n, D] as the family defines it."""
        module: Any = self.experts
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up = _linear(tokens, weights, up_name)
        inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        return _linear(inner, weights, "down_proj")


def find_sites(model: nn.Module, hidden: int, dtype: torch.dtype) -> list[MoESite]:
    """Return the MoE sites of a model built with its experts left out, in model order.

    Args:
        hidden: D, to try each router with one token.
        dtype: of the model's activations.
    """
    sites = []
    for path, experts in find_experts(model).items():
        block = model.get_submodule(path.rpartition(".")[0])
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        askable = _try_router(router, hidden, dtype) if isinstance(router, nn.Module) else None
        sites.append(MoESite(path, experts, router, askable))
    return sites


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    y = F.linear(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _gate_input_hook(
    before_router: Callable[[Tensor], None],
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        before_router(args[0].reshape(-1, args[0].shape[-1]))

    return hook


@torch.no_grad()
def _try_router(router: nn.Module, hidden: int, dtype: torch.dtype) -> AskableRouter | None:
    # Families differ in what a router takes and returns; asking is safer than a list of names.
    try:
        answer = router.forward(torch.zeros(1, hidden, dtype=dtype))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    if not (isinstance(answer, tuple) and len(answer) == 3):
        return None
    scores, _, topk_ids = answer
    fits = scores.ndim == topk_ids.ndim == 2 and not topk_ids.is_floating_point()
    return AskableRouter(router, scores.shape[1]) if fits and len(scores) == 1 else None
