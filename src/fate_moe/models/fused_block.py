"""How does a whole MoE block decode with nothing of torch between its parts?

For blocks that are experts(x, gate(x)), plus a shared expert where there is one, its share given by
a sigmoid or whole. Idle cores begin with the shared expert while experts are chosen; it is finished
before the first of them is waited for, so beside the reads that threads do. Tried, as layers are,
beside the block's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.models.cache_growing import is_plain
from fate_moe.models.fused_parts import FusedDense
from fate_moe.models.fused_step import are_tokens, differs, stand_ins
from fate_moe.models.seam import is_experts

_ROUTER, _EXPERTS = "gate", "experts"
_SHARED, _SHARE = ("shared_expert", "shared_experts"), "shared_expert_gate"


class FusedBlock:
    """The forward of one MoE block, of one token or of many."""

    def __init__(self, module: Any) -> None:
        """Bind a block.

        Raises:
            KeyError, TypeError, ValueError: it is built otherwise.
        """
        children = module._modules
        self.module = module
        self.router, self.experts = children[_ROUTER], children[_EXPERTS]
        if not is_experts(self.experts) or not hasattr(self.experts, "attached"):
            raise TypeError("its experts are its own")
        shared = [name for name in _SHARED if name in children]
        if set(children) - {_ROUTER, _EXPERTS, _SHARE, *shared} or len(shared) > 1:
            raise TypeError("it has parts of another kind")
        self.inner = {name: children[name] for name in children}
        self.shared = _shared_of(children, shared[0]) if shared else None
        self.width = int(self.router.weight.shape[1])
        self.own = module.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute tokens natively, others as ever."""
        if args or kwargs or not self._takes(hidden_states) or self._is_watched():
            return self.own(hidden_states, *args, **kwargs)
        x = hidden_states.view(-1, self.width)
        if self.shared is None:
            _, weights, ids = self.router(x)
            return self.experts.forward(x, ids, weights).view(hidden_states.shape)
        extra: list[Tensor] = []
        self.shared.start(x)
        try:
            _, weights, ids = self.router(x)
            out = self.experts.forward(
                x, ids, weights, beside=lambda: extra.append(self.shared.finish())
            )
        finally:
            if not extra:
                self.shared.drop()
        return out.add_(extra[0]).view(hidden_states.shape)

    def _takes(self, x: Tensor) -> bool:
        return are_tokens(x, self.width) if self.shared is None else self.shared.takes(x)

    @property
    def projections(self) -> tuple[Any, ...]:
        """The linear layers of the shared expert."""
        return () if self.shared is None else self.shared.projections

    @property
    def tolerance(self) -> float:
        """What it may differ by from the block's own forward."""
        return 1e-5 if self.shared is None else self.shared.tolerance

    def _is_watched(self) -> bool:
        """Say whether somebody hooked what would not be called, or put something in its place."""
        children = self.module._modules
        return any(
            children[name] is not one
            or (name != _ROUTER and (one._forward_hooks or one._forward_pre_hooks))
            for name, one in self.inner.items()
        ) or (self.shared is not None and self.shared.is_watched())


def _shared_of(children: Any, name: str) -> FusedDense:
    gate = children.get(_SHARE)
    if gate is None:
        return FusedDense(children[name])
    weight = gate.weight.detach()
    is_linear = type(gate) is nn.Linear and gate._parameters["bias"] is None
    if not is_linear or not is_plain(weight) or weight.shape[0] != 1:
        raise TypeError("the shared expert's gate is of another kind")
    return FusedDense(children[name], weight[0])


def fuse_block(module: Any) -> FusedBlock | None:
    """Make a block's forward and try it; None where it does not fit."""
    refusals = (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        fused = FusedBlock(module)
        return fused if _equals(fused) else None
    except refusals:
        return None


@torch.no_grad()
def _equals(fused: FusedBlock) -> bool:
    """Try both forwards around stand-ins for router and experts: what goes in, what comes out?"""
    return all(_equals_for(fused, tokens) for tokens in (1, 3))


def _equals_for(fused: FusedBlock, tokens: int) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, found = (torch.randn(1, tokens, fused.width, generator=draw) for _ in range(2))
    logits, weights = (torch.rand(tokens, count, generator=draw) for count in (4, 2))
    ids = torch.tensor([[2, 1]]).repeat(tokens, 1)
    seen: list[tuple[Tensor, ...]] = []

    def router(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((hidden_states.reshape(-1),))
        return logits, weights, ids

    def experts(x: Tensor, ids: Tensor, weights: Tensor, beside: Any = None) -> Tensor:
        seen.append((x.reshape(-1), ids.double(), weights))
        if beside is not None:
            beside()
        return found[0].clone()

    with stand_ins({fused.router: router, fused.experts: experts}):
        want, got = fused.own(x.clone()), fused.forward(x.clone())
    if not isinstance(want, Tensor) or len(seen) != 4:
        return False
    pairs = [*zip(seen[0], seen[2], strict=True), *zip(seen[1], seen[3], strict=True)]
    same = not any(differs(a, b) for a, b in pairs)
    return same and not differs(got, want, fused.tolerance)
