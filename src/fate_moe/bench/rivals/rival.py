"""What must a program do to be measured beside Fate?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Stage = Literal["prefill", "decode"]
STAGES: tuple[Stage, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing that all rivals are asked to do.

    Attributes:
        stage: read a prompt, or write tokens after a prompt of one token.
        tokens: how many to read or to write.
        passes: times that is done in one process; the last one counts, those before warm it up.
        limit_bytes: for the whole process; None: no limit.
        threads: computing threads.
    """

    stage: Stage
    tokens: int
    passes: int
    limit_bytes: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a program: its name in tables, and the command."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a program says of its last pass; `details` are its own counts, if it has any."""

    tok_s: float
    details: Mapping[str, object] = field(default_factory=dict)


class Rival(Protocol):
    """A program that runs the model."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that it reads the model from."""
        ...

    @property
    def is_mapping(self) -> bool:
        """Whether it leaves reading to the system, so that readahead matters under a limit."""
        ...

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        """Return its best-known settings for a cell, the likeliest first.

        Args:
            thorough: also those that are seldom the best.
        """
        ...

    def read(self, stdout: str) -> Reading:
        """Read what it printed.

        Raises:
            ConfigError: it is not what was expected.
        """
        ...
