"""How are one token's experts computed with few words between host and card?

Decoding, a layer's experts take the card some 25 us, and telling it so launch by launch takes the
host ten times as long. So the launches are recorded once (as CUDA graphs): the two matrices of as
many experts as a token has, and the sum. What changes from token to token, slots, weights and the
token itself, is copied to where the recording looks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_cuda: Any = torch.cuda  # half of it has no types

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""(tiles [K, 4], order [K], x [1, D], weights [K], inner [K, F], parts [K, D]) -> inner, parts."""
Add = Callable[[Tensor, Tensor, Tensor], None]
"""(parts [K, D], positions [K], out [1, D]) -> out."""


class OneToken:
    """The recorded launches of one layer, for tokens of one dtype with K experts each.

    What it returns is copied; everything else it has is used again by the next token, which is
    safe because the host has waited for the card in between, for that token's choice.
    """

    def __init__(self, run: Run, add: Add, inner: int, x: Tensor, weights: Tensor) -> None:
        """Record.

        Args:
            run, add: launch kernels.
            inner: F.
            x, weights: a token [1, D] and its weights [K], for shapes, dtypes and device.
        """
        k, device = len(weights), x.device
        self._x, self._out = torch.zeros_like(x), torch.zeros_like(x)
        self._weights = torch.zeros_like(weights)
        self._parts = x.new_zeros(k, x.shape[1])
        there = torch.zeros(5 * k, dtype=torch.int32, device=device)
        tiles, order = there[: 4 * k].view(k, 4), there[4 * k :]
        positions = torch.arange(k, dtype=torch.int32, device=device)
        between = x.new_zeros(k, inner)
        self._there = there
        self._recorded_with = positions, between  # a recording knows addresses, and holds nothing
        # One row for each piece that may land by itself.
        here = torch.zeros(k, 5 * k, dtype=torch.int32)
        self._here = here.pin_memory() if x.is_cuda else here
        self._rows: NDArray[np.int32] = self._here.numpy()
        self._run = _recorded(
            lambda: run(tiles, order, self._x, self._weights, between, self._parts), x.is_cuda
        )
        self._add = _recorded(lambda: add(self._parts, positions, self._out), x.is_cuda)
        self._piece = 0
        self._done = np.zeros(k, dtype=bool)

    def begin(self, x: Tensor, weights: Tensor, order: NDArray[Any]) -> None:
        """Take a token [1, D], its weights [K], and its choices by ascending expert [K]."""
        self._x.copy_(x)
        self._weights.copy_(weights)
        self._rows[:, 4 * len(order) :] = order
        self._piece = 0
        self._done[:] = False

    def run(self, tiles: NDArray[np.int32]) -> None:
        """Compute the experts of some tiles, [n, 4]."""
        row, k = self._rows[self._piece], len(self._done)
        row[: 4 * k] = 0  # the tiles that are none
        row[: tiles.size] = tiles.ravel()
        self._done[tiles[:, 2]] = True
        self._there.copy_(self._here[self._piece], non_blocking=True)
        self._piece += 1
        self._run()

    def end(self) -> Tensor:
        """Return the sum, [1, D]."""
        if not self._done.all():  # choices of no expert
            self._parts[np.flatnonzero(~self._done)] = 0
        self._add()
        return self._out.clone()


def _recorded(launch: Callable[[], None], on_card: bool) -> Callable[[], object]:
    """Return what makes the card do again what `launch` tells it; without a card, `launch`."""
    launch()  # compiles what has to be
    if not on_card:
        return launch
    graph = _cuda.CUDAGraph()
    current, aside = _cuda.current_stream(), _cuda.Stream()
    aside.wait_stream(current)
    with _cuda.stream(aside):
        # Other threads go on copying meanwhile. torch's own context would collect garbage first.
        graph.capture_begin(capture_error_mode="thread_local")
        launch()
        graph.capture_end()
    current.wait_stream(aside)
    replay: Callable[[], object] = graph.replay
    return replay
