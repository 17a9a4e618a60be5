"""What can go wrong, and what does the message carry?

    FateError
      ConfigError         unknown name, bad size, contradiction
      ModelError          unknown model, not an MoE, unsupported family, missing tensor
      BudgetError         the plan does not fit (budget_bytes, floor_bytes)
      StoreError
        FormatError       a store or checkpoint file breaks its format
        ReadError         a record could not be read (key, path, offset, errno)
      CacheError          a broken invariant of the expert table: our fault
      NativeUnavailable   a native part is missing, with the reason

Every message is one line: what, which, have/need, what to try. The command line prints it and
exits with code 2.
"""

from __future__ import annotations

import os

from fate_moe.types import ExpertKey


def reason(error: Exception) -> str:
    """Return what went wrong for people: of the system's errors neither number nor path."""
    return getattr(error, "strerror", None) or str(error)


class FateError(Exception):
    """Base of every error that Fate raises on purpose."""


class ConfigError(FateError):
    """A setting is unknown, malformed or contradicts another one."""


class ModelError(FateError):
    """A model cannot be found, is no MoE, or its family is not supported."""


class BudgetError(FateError):
    """The memory asked for is below what the plan needs at least."""

    def __init__(self, message: str, *, budget_bytes: int, floor_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes


class StoreError(FateError):
    """A store is missing, damaged or cannot be written."""


class FormatError(StoreError):
    """A file's content breaks the format it claims."""


class ReadError(StoreError):
    """One record could not be read; the request that needed it fails, the engine goes on."""

    def __init__(self, key: ExpertKey, path: str, offset: int, errno: int | None, why: str) -> None:
        code = "" if errno is None else f" (errno {errno}: {os.strerror(errno)})"
        super().__init__(f"cannot read {key}: {path} at offset {offset}: {why}{code}")
        self.key = key
        self.path = path
        self.offset = offset
        self.errno = errno


class CacheError(FateError):
    """The expert table broke one of its own invariants."""


class NativeUnavailable(FateError):  # noqa: N818 - the name is part of the contract
    """A native part cannot be used; the message says why."""
