"""May transformers build a model from the numbers of this config?

A skeleton takes time and memory per module, whatever its weights are; so whatever says how many
there are is bounded before transformers sees it. Widths are not: a skeleton has no weights.
Invariant: every level of the config is looked at, and the look takes no stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fate_moe.errors import FormatError

MAX_DEPTH = 1 << 12  # layers, blocks, stages: several times the deepest model
MAX_WIDTH = 1 << 16  # experts, heads or groups of one layer
MAX_EXPERTS = 1 << 22  # of all layers
MAX_ITEMS = 1 << 18  # of one list; some name every module that is kept unquantized
MAX_LEVELS = 32
_SHOWN = 80

# The words in a name that make it a count.
_DEEP = {
    "layer", "layers", "depth", "depths", "blocks", "stages", "repeats", "codebooks", "quantizers",
}  # fmt: skip
_WIDE = {"expert", "experts", "head", "heads", "group", "groups"}
_NO_COUNT = {"size", "vocab", "dim", "id"}  # such as shared_expert_intermediate_size
_ADDED_UP = {"n", "num", "depths", "blocks"}  # other lists may name layers by their numbers
_WORD = re.compile(r"[a-z]+")


def check_counts(path: Path, fields: dict[str, object]) -> None:
    """Refuse a config that asks for too many modules.

    Args:
        path: the file, for messages.
        fields: its content, untrusted.
    Raises:
        FormatError: a count, a list or the nesting is beyond its bound.
    """
    layers = experts = 1
    for name, key, numbers in _numbers(path, fields):
        words = set(_WORD.findall(key.lower()))
        is_wide = bool(words & _WIDE)
        if words & _NO_COUNT or not (is_wide or words & _DEEP):
            continue
        limit = MAX_WIDTH if is_wide else MAX_DEPTH
        sizes = [abs(number) for number in numbers]
        have = max(sizes, default=0) if is_wide or not words & _ADDED_UP else sum(sizes)
        if have > limit:
            shown = numbers[0] if len(numbers) == 1 else have
            raise FormatError(f"{path}: {name} is {shown!s:.40}, need at most {limit}")
        if not is_wide:
            layers = max(layers, have)
        elif "experts" in words:
            experts = max(experts, have)
    if layers * experts > MAX_EXPERTS:
        raise FormatError(
            f"{path}: {layers} layers of {experts} experts are {layers * experts} experts, "
            f"need at most {MAX_EXPERTS}"
        )


def _numbers(path: Path, fields: dict[str, object]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield dotted name, last key and integers of every number and every list, at all levels."""
    left: list[tuple[str, str, object, int]] = [("", "", fields, 0)]
    while left:
        name, key, value, level = left.pop()
        if level > MAX_LEVELS:
            raise FormatError(f"{path}: {name:.{_SHOWN}} is nested deeper than {MAX_LEVELS} levels")
        if isinstance(value, dict):
            for inner, item in value.items():
                shown = inner[:_SHOWN] if inner.isprintable() else ascii(inner)[:_SHOWN]
                left.append((f"{name}.{shown}" if name else shown, inner, item, level + 1))
        elif isinstance(value, list):
            if len(value) > MAX_ITEMS:
                raise FormatError(
                    f"{path}: {name} has {len(value)} items, need at most {MAX_ITEMS}"
                )
            yield name, key, [item for item in value if isinstance(item, int)]
            nested = (item for item in value if isinstance(item, dict | list))
            left.extend((name, key, item, level + 1) for item in nested)
        elif isinstance(value, int):
            yield name, key, [value]
