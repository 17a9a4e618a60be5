"""How do a layer's cached keys and values grow by a token without being copied?

transformers' own layer makes a new tensor of the whole history for every token. These keep room
behind what they hold and write in place; what they return is a view of it, with the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_LEAST_ROOM = 64
"""Tokens of room that a cache starts with, and least by which one with a window grows."""


Row = tuple[int, int, int, int]
"""Addresses of the first held key and value, floats from head to head, rows held."""


class _Rows:
    """Keys and values [B, H, capacity, width], of which rows `first` to `first + count` are held.

    Rows that were never written take no memory yet: the system hands out pages when they are.
    """

    def __init__(self, keys: Tensor, values: Tensor, limit: int) -> None:
        self.limit = limit  # tokens that will be held at most, as far as is known
        self.first = 0
        self.count = 0
        self.capacity = 0
        self.keys, self.values = keys, values
        self._move(keys.shape[-2])
        self.append(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.reserve(keys.shape[-2])
        end = self.first + self.count
        self.keys[:, :, end : end + keys.shape[-2]] = keys
        self.values[:, :, end : end + keys.shape[-2]] = values
        self.count += keys.shape[-2]

    def reserve(self, tokens: int) -> None:
        if self.first + self.count + tokens > self.capacity:
            self._move(self.count + tokens)

    def views(self) -> tuple[Tensor, Tensor]:
        return (
            self.keys.narrow(2, self.first, self.count),
            self.values.narrow(2, self.first, self.count),
        )

    def _move(self, needed: int) -> None:
        """Make room for `needed` rows, those that are held coming first."""
        room = max(min(2 * needed, self.limit), needed) + _LEAST_ROOM
        batch, heads = self.keys.shape[:2]
        held = slice(self.first, self.first + self.count)
        moved = []
        for old in (self.keys, self.values):
            new = old.new_empty(batch, heads, room, old.shape[-1])
            new[:, :, : self.count] = old[:, :, held]
            moved.append(new)
        self.keys, self.values = moved
        self.first, self.capacity = 0, room
        self.addresses = moved[0].data_ptr(), moved[1].data_ptr()


class _Growing:
    """What both kinds of layer share. `keys` and `values` look like plain attributes.

    Whoever sets them (transformers does, to reorder or repeat a batch) replaces what is held; the
    next token then starts a new allocation.
    """

    limit: int
    _rows: _Rows | None = None
    _plain: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def keys(self) -> Tensor | None:
        return self._plain[0] if self._rows is None else self._rows.views()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._plain = keys, self._let_go()[1]

    @property
    def values(self) -> Tensor | None:
        return self._plain[1] if self._rows is None else self._rows.views()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._plain = self._let_go()[0], values

    def _let_go(self) -> tuple[Tensor | None, Tensor | None]:
        if self._rows is not None:
            self._plain, self._rows = self._rows.views(), None
        return self._plain

    def _held(self) -> _Rows | None:
        """Return the rows, made from the plain tensors where there are some."""
        keys, values = self._plain
        if self._rows is None and keys is not None and values is not None and keys.dim() == 4:
            self._rows, self._plain = _Rows(keys, values, self.limit), (None, None)
        return self._rows

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._held()
        if rows is None:
            rows = self._rows = _Rows(keys, values, self.limit)
        else:
            rows.append(keys, values)
        return rows.views()

    def row(self) -> Row | None:
        """Find where the next token's keys and values go.

        Returns:
            The next row after those held is free. None while nothing is held.
        """
        rows = self._rows or self._held()
        if rows is None:
            return None
        rows.reserve(1)
        skipped = rows.first * rows.keys.shape[-1] * 4
        keys, values = rows.addresses
        stride = rows.capacity * rows.keys.shape[-1]
        return keys + skipped, values + skipped, stride, rows.count


class GrowingLayer(_Growing, DynamicLayer):  # type: ignore[misc]
    """A layer that keeps every token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens [B, H, n, width]; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._plain = None, None
        return self._append(key_states, value_states)

    def take(self) -> None:
        """Count the row that was written where `row` said."""
        assert self._rows is not None
        self._rows.count += 1

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return int(super().get_seq_length()) if self._rows is None else self._rows.count

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative number, as in transformers."""
        if self._rows is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self._rows.count = max(0, self._rows.count + tokens_to_remove)


class GrowingSlidingLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the last `sliding_window - 1` tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens [B, H, n, width]; return those and the ones they may look back at."""
        if self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._plain = None, None
        self.cumulative_length += key_states.shape[-2]
        seen = self._append(key_states, value_states)
        self._slide()
        return seen

    def take(self) -> None:
        """Count the row that was written where `row` said, and let the oldest go."""
        assert self._rows is not None
        self._rows.count += 1
        self.cumulative_length += 1
        self._slide()

    def _slide(self) -> None:
        rows = self._rows
        assert rows is not None
        surplus = rows.count - (self.sliding_window - 1)
        if surplus > 0:
            rows.first += surplus
            rows.count -= surplus


def growing_layer(cache: Any, index: int, limit: int) -> GrowingLayer | GrowingSlidingLayer | None:
    """Return a cache's layer as one that grows in place, replacing it where it does not yet.

    Args:
        cache: of transformers.
        index: of the layer.
        limit: tokens that will be held at most, as far as is known.
    Returns:
        None where the cache, or the layer, is of another kind, empty, or records its past.
    """
    if type(cache) is not DynamicCache or index >= len(cache.layers) or cache.offloading:
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer and layer.is_initialized:
        grown: Any = GrowingLayer()
    elif type(layer) is DynamicSlidingWindowLayer and layer.is_initialized:
        grown = GrowingSlidingLayer(layer.sliding_window)
        grown.cumulative_length, grown.record_past = layer.cumulative_length, layer.record_past
    elif type(layer) in (GrowingLayer, GrowingSlidingLayer):
        grown = layer
    else:
        return None
    if getattr(grown, "record_past", False):
        return None
    if grown is not layer:
        grown.is_initialized, grown.limit = True, limit
        if grown.is_sliding:
            grown.limit = min(limit, grown.sliding_window)
        grown.dtype, grown.device = layer.dtype, layer.device
        grown._plain = layer.keys, layer.values
        cache.layers[index] = grown
    return grown  # type: ignore[no-any-return]


def is_plain(tensor: Tensor) -> bool:
    """Say whether the native core can read a tensor where it lies, as floats of 32 bits."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()
