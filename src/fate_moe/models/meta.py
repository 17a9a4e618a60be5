"""What does an operation on the meta device make, without working it out twice?

torch answers for most operations by Python code of a quarter of a millisecond, and a model's layers
are alike: what was answered once is answered from memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_Made = tuple[torch.Size, tuple[int, ...], torch.dtype]


class RememberedShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the scope, an operation that was seen with like arguments is not worked out again.

    What it makes has the same shape, strides and dtype, for on the meta device nothing depends on
    anything but these and the numbers given along. Remembered is only what makes one new tensor, of
    nothing but tensors on the meta device; all else runs as ever.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answered = 0
        self._made: dict[Any, _Made] = {}
        self._makes_new: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._makes_new:
            self._makes_new[func] = _makes_anew(func._schema)
        if not self._makes_new[func]:
            return func(*args, **kwargs)
        try:
            key = func, _key_of(args), _key_of(kwargs.items())
            made = self._made.get(key)
        except TypeError:  # what is no key
            return func(*args, **kwargs)
        if made is not None:
            self.answered += 1
            shape, stride, dtype = made
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        result = func(*args, **kwargs)
        if _is_plain(result):
            self._made[key] = result.shape, result.stride(), result.dtype
        return result


def _makes_anew(schema: Any) -> bool:
    return not schema.is_mutable and all(made.alias_info is None for made in schema.returns)


def _is_plain(value: Any) -> bool:
    # A tensor of no dimensions may be a Python number, which counts less where types meet.
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.is_meta
        and value.ndim > 0
        and not (value.is_conj() or value.is_neg())
    )


def _key_of(values: Iterable[Any]) -> tuple[Any, ...]:
    """Put all that shapes may depend on into a key; 1, 1.0 and True are not the same.

    Raises:
        TypeError: there is a tensor that this does not tell everything about.
    """
    return tuple(_key_of_one(value) for value in values)


def _key_of_one(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not _is_plain(value):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    return _key_of(value) if isinstance(value, list | tuple) else (type(value), value)
