"""How does a token go through consecutive decoder layers in few native calls?

Where nothing is guessed or watched, and a layer's experts are all resident, there is nothing to do
before the next layer but to compute. The first layer of such a run then computes all, the others
hand on what they get. At a layer that misses an expert, or that guesses the next one's, the run
stops; it computes that layer's experts as they land, and goes on. It is made of layers that are
fused already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fate_moe.compute import Arriving, NativeExperts
from fate_moe.models.fused_block import FusedBlock
from fate_moe.models.fused_layer import FusedLayer
from fate_moe.models.fused_parts import FusedDense, FusedRouter
from fate_moe.models.fused_step import find_row, is_one_token, read_call
from fate_moe.models.turnstile import Turnstile
from fate_moe.moe import Observer
from fate_moe.native import core
from fate_moe.prefetch.passing import Passed, Place

_DONE = "_fate_run"
"""Attribute of what a run has computed, until its last layer has handed it on."""


class Held(Protocol):
    """Says what is resident, and keeps it so; see `prefetch.passing`."""

    def guess_level(self) -> int:
        """Say how much is guessed for each layer: nothing, once, twice; see `Benefit`."""

    def open(self, place: Callable[[list[Place]], None]) -> None:
        """Hold what is resident, and tell what has changed since the last time."""

    def close(self, passed: Sequence[Passed]) -> None:
        """Let go; book what was passed."""


class Gathering(Protocol):
    """Gets the experts of one layer; see `MoELayer`."""

    @property
    def layer(self) -> int: ...

    @property
    def observer(self) -> Observer | None: ...

    def before_router(self, gate_input: Tensor) -> None: ...

    def skip_layer(self) -> None: ...

    def gather(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        compute: Callable[[Arriving], None],
        beside: Callable[[], None],
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Sparse:
    """The parts of a layer with routed experts."""

    block: FusedBlock
    router: FusedRouter
    experts: NativeExperts
    moe: Gathering


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
        self._hooked = [one for one in hooks if one]
        self._inner = [m._modules for m in own if m._modules]
        self._outer = [m.__dict__ for m in own]
        self._seen = self._look()

    def holds(self) -> bool:
        """Say whether all is as it was. Cost: some 70 microseconds for 540 modules."""
        return not any(self._unhooked) and self._look() == self._seen

    def _look(self) -> list[list[Any]]:
        return [
            *map(list, self._hooked),
            *[[*parts, *parts.values()] for parts in self._inner],
            [own.get("forward") for own in self._outer],
        ]


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
        held: says which experts are resident.
        is_alike: whether all layers are called with the same arguments, each with what the one
            before returned, as was seen once.
        handed_on: what the last layer that was seen returned.
    """

    def __init__(
        self, layers: Sequence[RunLayer], home: nn.ModuleList, held: Held, config: Any
    ) -> None:
        """Bind layers.

        Args:
            layers: fused, one after the other; their modules call them already.
            home: the list that they are in.
            held: says which experts of those that have some are resident.
            config: the text model's; it may tell a model to leave its last layers out.
        """
        self.layers = tuple(layers)
        self.is_alike = False
        self.held, self.config = held, config
        self._depth = config.num_hidden_layers
        self._first = layers[0].layer.attention
        self._seen: dict[str, Any] = {}
        self._next = 0
        self.handed_on: Tensor | None = None
        self._inside = threading.local()
        self._caches = [(one.layer.attention.index, one.layer.attention.limit) for one in layers]
        numbered = ((n, one.feed_forward) for n, one in enumerate(layers))
        self._sparse = {n: part for n, part in numbered if isinstance(part, Sparse)}
        self._numbers = {part.moe.layer: n for n, part in self._sparse.items()}
        experts = [part.block.experts for part in self._sparse.values()]
        self._attached = [(one, one.attached) for one in experts]
        inner = [m for one in layers for m in one.layer.module.modules()]
        self._untouched = Untouched([home, *inner])
        # One token at a time is on its way, and nobody else computes with the same shared experts.
        parts = [one.feed_forward for one in layers]
        denses = [one.block.shared if isinstance(one, Sparse) else one for one in parts]
        alone = dict.fromkeys(one.alone for one in denses if one is not None)
        self._turnstiles = list(alone) or [Turnstile()]
        (k,) = {part.router.k for part in self._sparse.values()}
        self._normed = torch.empty(1, layers[0].layer.width)
        self._ids = torch.empty(len(layers), k, dtype=torch.long)
        self._weights = torch.empty(len(layers), k)
        self._rows = [(self._ids[n : n + 1], self._weights[n : n + 1]) for n in range(len(layers))]
        self._times = torch.empty(len(layers), 2, dtype=torch.double)
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
        Raises:
            ReadError: an expert could not be read.
        """
        call, positions = read_call(kwargs), self._first.positions
        level = self.held.guess_level()
        # A second guess is made from what enters a layer.
        if call is None or level > 1 or not self._is_as_it_was():
            return None
        turn = positions.addresses(call.embeddings, self._first.rotary)
        found = [find_row(call.past, index, limit) for index, limit in self._caches]
        rows = [one[1] for one in found if one is not None]
        if turn is None or len(rows) < len(found):
            return None
        if not positions.sees_all(call.mask, rows[0][3] + 1):
            return None
        with ExitStack() as stack:
            for one in self._turnstiles:
                stack.callback(one.leave)
                one.enter()
            out = self._go(x, turn, rows, guesses=level > 0)
        for row in found:
            if row is not None:
                row[0].take()
        for number, part in self._sparse.items():
            if number > 0:  # the first layer's own call is the one that computes
                part.moe.skip_layer()
        setattr(out, _DONE, self)
        return out

    def _go(self, x: Tensor, turn: tuple[int, int], rows: list[Any], guesses: bool) -> Tensor:
        out, native = torch.empty(x.shape), self._native
        buffers = (out, self._normed, self._ids, self._weights, self._times)
        native.begin(x.data_ptr(), *turn, rows, *(one.data_ptr() for one in buffers))
        first = 0
        try:
            while (number := self._advance(first, guesses)) < len(self.layers):
                part = self._sparse[number]
                part.moe.before_router(self._normed)
                part.moe.gather(
                    *self._rows[number], partial(self._compute, part.experts), native.finish_dense
                )
                first = number + 1
        finally:
            native.finish_dense()
        return out

    def _compute(self, experts: NativeExperts, arriving: Arriving) -> None:
        for landed in arriving:
            self._native.compute(experts.places(landed))

    def _advance(self, first: int, guesses: bool) -> int:
        """Go on from a layer, not begun, to the next one that is not passed, or to the end."""
        if guesses:
            return int(self._native.advance(True))
        passed: list[Passed] = []
        self.held.open(self._place)
        try:
            began = time.perf_counter()
            number = int(self._native.advance(False))
            if number > first:
                passed = self._passed(first, number, began)
        finally:
            self.held.close(passed)
        return number

    def _passed(self, first: int, end: int, began: float) -> list[Passed]:
        ids, times = self._ids[first:end].tolist(), self._times[first:end].tolist()
        return [
            Passed(self._sparse[at].moe.layer, sorted(chosen), began + chosen_s, done_s - chosen_s)
            for at, chosen, (chosen_s, done_s) in zip(range(first, end), ids, times, strict=True)
            if at in self._sparse
        ]

    def _place(self, moved: list[Place]) -> None:
        addresses = []
        for (layer, expert), slot in moved:
            number = self._numbers[layer]
            address = 0 if slot is None else self._sparse[number].experts.slot_address(slot)
            addresses.append((number, expert, address))
        if addresses:
            self._native.place(addresses)

    def _is_as_it_was(self) -> bool:
        return (
            getattr(self._inside, "is_open", False)
            and self.config.num_hidden_layers == self._depth
            and self._untouched.holds()
            and all(part.moe.observer is None for part in self._sparse.values())
            and all(one.attached is ours for one, ours in self._attached)
        )
