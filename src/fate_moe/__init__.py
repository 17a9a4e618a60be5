"""Fate: run any Mixture-of-Experts language model in a fraction of its memory.

    model, tokenizer = fate_moe.load("smolmoe", experts="50%")

Public names are resolved on first use, so that `import fate_moe.cache` or `fate_moe.sim` never
pulls torch in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fate_moe.engine.handle import Engine
    from fate_moe.engine.load import load
    from fate_moe.errors import (
        BudgetError,
        ConfigError,
        FateError,
        FormatError,
        ModelError,
        ReadError,
        StoreError,
    )

__version__ = "0.1.0"

_HOMES = {
    "BudgetError": "fate_moe.errors",
    "ConfigError": "fate_moe.errors",
    "Engine": "fate_moe.engine",
    "FateError": "fate_moe.errors",
    "FormatError": "fate_moe.errors",
    "ModelError": "fate_moe.errors",
    "ReadError": "fate_moe.errors",
    "StoreError": "fate_moe.errors",
    "load": "fate_moe.engine",
}

__all__ = [
    "BudgetError",
    "ConfigError",
    "Engine",
    "FateError",
    "FormatError",
    "ModelError",
    "ReadError",
    "StoreError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fate_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
