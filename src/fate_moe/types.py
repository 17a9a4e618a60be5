"""Which nouns do all stages share?

The words of GLOSSARY.md as types. Standard library only; every other module may import this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol


class ExpertKey(NamedTuple):
    """One routed expert: MoE layer in [0, L), expert in [0, E)."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}"


class Phase(Enum):
    """Which part of a generation a forward step belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Choice:
    """What the router of one layer chose in one step.

    Attributes:
        layer: the MoE layer, in [0, L).
        experts: distinct ids; requests come in this order.
        tokens: T of the step; one token is decode, more are prefill.
        counts: tokens of each expert; None = one each.
        low: the experts that are computed from their INT2 head.
        light: of the others, those for which the head is enough if not all of them is there.
    """

    layer: int
    experts: Sequence[int]
    tokens: int = 1
    counts: Sequence[int] | None = None
    low: frozenset[int] = frozenset()
    light: frozenset[int] = frozenset()

    @property
    def phase(self) -> Phase:
        """What the counts are booked under."""
        return Phase.PREFILL if self.tokens > 1 else Phase.DECODE


@dataclass(frozen=True, slots=True)
class Prediction:
    """The experts a predictor expects one layer to need.

    Attributes:
        layer: the MoE layer the guess is for, in [0, L).
        ranked: distinct expert ids, most likely first.
        core: how many of the first ids the router itself would take (the union over the tokens
            of its top-k); the rest is the extended width.
        counts: how many tokens are guessed to choose each of `ranked`; None = one each.
        low: the experts whose INT2 head is guessed to be enough.
    """

    layer: int
    ranked: tuple[int, ...]
    core: int
    counts: tuple[int, ...] | None = None
    low: frozenset[int] = frozenset()


class Progress(Protocol):
    """Receives how far a long job is; `done` and `total` share one unit (bytes or steps)."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress; the default of every library call."""


Json = Mapping[str, object]
