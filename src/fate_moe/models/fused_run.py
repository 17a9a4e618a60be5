"""How does a token go through consecutive decoder layers in one native call?

Where every expert of them is resident and nothing is guessed or watched, there is nothing to do
between layers but to compute. The first layer of such a run then computes all, the others hand on
what they get. A run is made of layers that are fused already; it is tried beside them, and must
have the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import DynamicCache

from fate_moe.compute import NativeExperts
from fate_moe.models.fused_block import FusedBlock
from fate_moe.models.fused_layer import FusedLayer
from fate_moe.models.fused_parts import FusedDense, FusedRouter
from fate_moe.models.fused_step import find_row, is_one_token, read_call
from fate_moe.moe import MoELayer
from fate_moe.native import core
from fate_moe.prefetch.whole import Whole

_log = logging.getLogger(__name__)

_DONE = "_fate_run"
"""Attribute of what a run has computed, until its last layer has handed it on."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """The parts of a layer with routed experts."""

    block: FusedBlock
    router: FusedRouter
    experts: NativeExperts
    moe: MoELayer


class Untouched:
    """What modules look like to whoever would be passed over: their hooks, parts and forwards."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Remember modules, and all within them, as they are now.

        A hook that is there already, such as ours before a router, is one that may be passed over.
        """
        own = list(modules)
        everywhere = [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        kinds = [[m._forward_hooks for m in own], [m._forward_pre_hooks for m in own]]
        hooks = [one for kind in [*kinds, everywhere] for one in kind]
        self._unhooked = [one for one in hooks if not one]
        self._hooked = [(one, list(one)) for one in hooks if one]
        self._parts = [(m._modules, name, part) for m in own for name, part in m._modules.items()]
        self._forwards = [(m.__dict__, m.__dict__.get("forward")) for m in own]

    def holds(self) -> bool:
        """Say whether all is as it was."""
        return not (
            any(self._unhooked)
            or any(list(hooks) != names for hooks, names in self._hooked)
            or any(parts.get(name) is not part for parts, name, part in self._parts)
            or any(own.get("forward") is not forward for own, forward in self._forwards)
        )


class RunLayer:
    """The forward of one decoder layer of a run."""

    def __init__(self, layer: FusedLayer, feed_forward: Sparse | FusedDense) -> None:
        self.layer, self.feed_forward = layer, feed_forward
        self._run: FusedRun | None = None
        self._number = 0
        self._is_last = False

    def join(self, run: FusedRun, number: int) -> None:
        """Be the layer of that number in a run from now on."""
        self._run, self._number, self._is_last = run, number, number == len(run.layers) - 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the whole run, hand on what it computed, or compute this layer alone."""
        run = self._run
        if run is not None:
            if getattr(hidden_states, _DONE, None) is run:
                if self._is_last:
                    delattr(hidden_states, _DONE)
                return hidden_states
            if not args and is_one_token(hidden_states, self.layer.width):
                if not run.is_alike:
                    run.see(self._number, hidden_states, kwargs)
                    out = self.layer.forward(hidden_states, **kwargs)
                    run.handed_on = out
                    return out
                if self._number == 0:
                    out = run.compute(hidden_states, kwargs)
                    if out is not None:
                        return out
        return self.layer.forward(hidden_states, *args, **kwargs)


class FusedRun:
    """Consecutive decoder layers, for one token at a time.

    It is computed within the forward of the module that has the layers, so a layer that somebody
    calls alone computes itself alone; and one by one while anybody looks on. (transformers leaves
    its hooks for `output_hidden_states` and the like in place: from such a call on, somebody does.)

    Attributes:
        is_alike: whether all layers are called with the same arguments, each with what the one
            before returned, as was seen once.
        handed_on: what the last layer that was seen returned.
    """

    def __init__(
        self, layers: Sequence[RunLayer], home: nn.ModuleList, whole: Whole, config: Any
    ) -> None:
        """Bind layers.

        Args:
            layers: fused, one after the other; their modules call them already.
            home: the list that they are in.
            whole: holds the experts of those that have some.
            config: the text model's; it may tell a model to leave its last layers out.
        """
        self.layers = tuple(layers)
        self.is_alike = False
        self._whole, self._config = whole, config
        self._depth = config.num_hidden_layers
        self._first = layers[0].layer.attention
        self._seen: dict[str, Any] = {}
        self._next = 0
        self.handed_on: Tensor | None = None
        self._inside = threading.local()
        self._caches = [(one.layer.attention.index, one.layer.attention.limit) for one in layers]
        sparse = [one.feed_forward for one in layers if isinstance(one.feed_forward, Sparse)]
        experts = [part.block.experts for part in sparse]
        self._experts = [(one, one.attached) for one in experts]
        self._moe = [part.moe for part in sparse]
        inner = [m for one in layers for m in one.layer.module.modules()]
        self._untouched = Untouched([home, *inner])
        self._addresses = [part.experts.slot_address for part in sparse]
        (self._chosen,) = {part.router.k for part in sparse}
        self._slots: list[list[int]] | None = None
        self._native = core().TokenRun()
        for one in layers:
            part = one.feed_forward
            if isinstance(part, Sparse):
                shared = part.block.shared
                dense = None if shared is None else shared.block
                self._native.add(one.layer.block, part.router.block, part.experts.shape, dense)
            else:
                self._native.add_dense(one.layer.block, part.block)

    def enter(self, *call: Any) -> None:
        """Be told that the module which has the layers is called."""
        self._inside.is_open = True

    def leave(self, *call: Any) -> None:
        """Be told that it has returned."""
        self._inside.is_open = False

    def see(self, number: int, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Watch a step that goes layer by layer: do all get what the first one gets?"""
        if number == 0:
            self._seen, self._next = kwargs, 0
        is_next = number == self._next and (number == 0 or x is self.handed_on)
        same = kwargs.keys() == self._seen.keys()
        if is_next and same and all(kwargs[k] is v for k, v in self._seen.items()):
            self._next += 1
            self.is_alike = self._next == len(self.layers)
        else:
            self._next = -1
        if self.is_alike or self._next < 0:
            self._seen, self.handed_on = {}, None  # a cache is not to live as long as the model

    def compute(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Compute all layers for one token [.., D]; None where they must go one by one.

        Args:
            kwargs: of the first layer's call, and so of all others'.
        """
        call, positions = read_call(kwargs), self._first.positions
        if call is None or not self._is_as_it_was():
            return None
        turn = positions.addresses(call.embeddings, self._first.rotary)
        found = [find_row(call.past, index, limit) for index, limit in self._caches]
        rows = [one[1] for one in found if one is not None]
        if turn is None or len(rows) < len(found):
            return None
        chosen, out = 0, torch.empty(x.shape)
        if not positions.sees_all(call.mask, rows[0][3] + 1) or not self._whole.open():
            return None
        try:
            self._find_experts()
            self._native.step(x.data_ptr(), *turn, rows, out.data_ptr())
            chosen = self._chosen
            for one in found:
                if one is not None:
                    one[0].take()
        finally:
            self._whole.close(chosen)
        setattr(out, _DONE, self)
        return out

    def _is_as_it_was(self) -> bool:
        return (
            getattr(self._inside, "is_open", False)
            and self._config.num_hidden_layers == self._depth
            and self._untouched.holds()
            and all(moe.observer is None for moe in self._moe)
            and all(one.attached is ours for one, ours in self._experts)
        )

    def _find_experts(self) -> None:
        slots = self._whole.slots
        if slots is self._slots:
            return
        found = iter(
            [address(slot) for slot in layer]
            for address, layer in zip(self._addresses, slots, strict=True)
        )
        sparse = (isinstance(one.feed_forward, Sparse) for one in self.layers)
        self._native.place([next(found) if is_sparse else [] for is_sparse in sparse])
        self._slots = slots


def fuse_runs(
    model: nn.Module, moe_layers: Mapping[nn.Module, MoELayer], hold: Callable[..., Whole]
) -> int:
    """Let tokens go through runs of fused layers in one native call each.

    Args:
        model: of transformers; `fuse` has been over it, and its experts are attached.
        moe_layers: by their experts module, those whose experts are all resident for good.
        hold: makes what holds the experts, E of each, of layers by their number.
    Returns:
        How many layers are part of a run.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    count = 0
    for home, layers in _runs_of(model, moe_layers, config):
        sparse = [one.feed_forward for one in layers if isinstance(one.feed_forward, Sparse)]
        if len(layers) < 2 or len({part.router.k for part in sparse}) != 1:
            continue
        whole = hold({part.moe.layer: part.router.experts for part in sparse})
        for one in layers:
            one.layer.module.forward = one.forward
        run = _try(layers, model.get_submodule(home), whole, config)
        if run is not None:
            owner = model.get_submodule(home.rpartition(".")[0])
            owner.register_forward_pre_hook(run.enter)
            owner.register_forward_hook(run.leave, always_call=True)
            for number, one in enumerate(layers):
                one.join(run, number)
            count += len(layers)
        else:
            _log.debug("a run of %d layers differs from them one by one", len(layers))
            for one in layers:
                one.layer.module.forward = one.layer.forward
    return count


def _runs_of(
    model: nn.Module, moe_layers: Mapping[nn.Module, MoELayer], config: Any
) -> Iterator[tuple[str, list[RunLayer]]]:
    """Yield the longest lists of neighbours that may be part of a run, and the list's path.

    Layers of different types get different masks: they are no run.
    """
    types = getattr(config, "layer_types", None) or ()

    def kind(part: RunLayer | None) -> tuple[bool, Any]:
        index = 0 if part is None else part.layer.attention.index
        return part is not None, types[index] if index < len(types) else None

    for path, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            parts = [_run_layer(one, moe_layers) for one in modules]
            for (is_part, _), some in groupby(parts, kind):
                if is_part:
                    yield path, [part for part in some if part is not None]


def _try(layers: Sequence[RunLayer], home: Any, whole: Whole, config: Any) -> FusedRun | None:
    refusals = (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    )  # fmt: skip
    try:
        run = FusedRun(layers, home, whole, config)
        return run if _equals(run) else None
    except refusals:
        return None


def _run_layer(module: nn.Module, moe_layers: Mapping[nn.Module, MoELayer]) -> RunLayer | None:
    layer = _fused(module)
    if not isinstance(layer, FusedLayer) or layer.residual != 1.0:
        return None
    inner = _fused(layer.feed_forward)
    if isinstance(inner, FusedDense):
        return RunLayer(layer, inner)
    moe = moe_layers.get(inner.experts) if isinstance(inner, FusedBlock) else None
    router = _fused(inner.router) if moe is not None else None
    if moe is None or not isinstance(router, FusedRouter):
        return None
    experts = moe.experts
    if not isinstance(experts, NativeExperts) or router.experts != moe.num_experts:
        return None
    return RunLayer(layer, Sparse(inner, router, experts, moe))


def _fused(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("forward"), "__self__", None)


@torch.no_grad()
def _equals(run: FusedRun) -> bool:
    """Try the run and its layers, one by one, on the same token and the same short history."""
    draw = torch.Generator().manual_seed(0)
    first = run.layers[0].layer
    x = torch.randn(1, 1, first.width, generator=draw)
    angles = torch.randn(1, 1, first.attention.rotary // 2, generator=draw).repeat(1, 1, 2)
    call: dict[str, Any] = {
        "position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None,
        "position_ids": torch.full((1, 1), 3),
    }  # fmt: skip
    caches = [_history(run, draw.manual_seed(1)) for _ in range(2)]
    want = x.clone()
    for one in run.layers:
        want = one.layer.forward(want, past_key_values=caches[0], **call)
    run.enter()
    got = run.compute(x, {"past_key_values": caches[1], **call})
    run.leave()
    return got is not None and torch.equal(got, want)


def _history(run: FusedRun, draw: torch.Generator) -> DynamicCache:
    cache = DynamicCache(config=run._config)
    for one in run.layers:
        attention = one.layer.attention
        heads = torch.randn(2, 1, attention.kv_heads, 3, attention.dim, generator=draw)
        cache.layers[attention.index].update(heads[0], heads[1])
    return cache
