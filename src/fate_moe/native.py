"""Is the native core here, and if not, why?

The core is the compiled module `_native` (csrc/), built by `pip install`; its contents are in
`_native.pyi`. Everything works without it, slowly. Knows no torch: addresses and lengths cross.
It takes the widest instructions that the processor has, unless told otherwise.
"""

from __future__ import annotations

import importlib
from typing import Any

from fate_moe.errors import ConfigError, NativeUnavailable


def _find() -> tuple[Any, str]:
    try:
        return importlib.import_module("fate_moe._native"), ""
    except ModuleNotFoundError:
        return None, "it was not built: there was no C++ compiler when fate was installed"
    except ImportError as error:  # made for another Python, or a library that it needs is gone
        return None, f"it cannot be loaded: {error}"


_module, why_missing = _find()
"""The native module or None, and why it is missing; empty where it is not."""


def is_available() -> bool:
    """Say whether the native core can be used."""
    return _module is not None


def core() -> Any:
    """Return the native module.

    Raises:
        NativeUnavailable: there is none; the message says why.
    """
    if _module is None:
        raise NativeUnavailable(
            f"no native core: {why_missing}; install a compiler such as g++, then fate again"
        )
    return _module


def use_instructions(name: str) -> None:
    """Compute with other instructions than the widest that the processor has.

    Raises:
        ConfigError: it does not have them; NativeUnavailable: there is no native core.
    """
    known = core().isas()
    if name not in known:
        raise ConfigError(f"{name!r:.40} is none that this processor has: {', '.join(known)}")
    core().use_isa(name)
