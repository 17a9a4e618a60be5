"""Who is likely to be asked for in this layer's next step? Those stay.

An expert's worth is the chance that the next step asks for it, from two observations of the run:
    how often it was chosen lately: a mean that fades by a twentieth with every token
    how often it followed: of the steps after one that chose expert e (and, weaker, the one before),
        the share that chose it, summed over the experts e chosen now
What this step uses is worth more. A newcomer worth less than everyone in a full region is not
admitted, where a spare slot can hold it for as long as it is computed.
The arithmetic is native where there is a native core (csrc/transition.cpp), which costs a tenth;
the bits are the same, for every float32 sum has one order.
Ours; constants tuned on two public routing traces and judged on the third, see
`docs/experiments.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fate_moe import native
from fate_moe.cache.policy import Evictable, EvictionPolicy
from fate_moe.types import Choice, ExpertKey

KEPT = 0.95  # of the mean, with every token
FOLLOWING = 0.2  # weight of the second observation
BEFORE_LAST = 0.3  # weight of the step before the last one in it
UNSURE = 1.0  # steps that count against every pair
IN_USE = 0.4  # what being used now is worth
_GROWTH = 32  # ids that room is made for at once


class Transition(EvictionPolicy):
    """Evict the expert that is least likely to be asked for next.

    Cost: a step of one token adds K x K counts and, only where someone has to go, weighs the
    layer's experts once, O(K x E); a request is O(1). Memory: 4 E x E bytes a layer.
    """

    def __init__(self, capacity_slots: int) -> None:
        self.capacity_slots = capacity_slots
        self._layers: dict[int, Layer] = {}

    @staticmethod
    def layer_bytes(num_experts: int) -> int:
        return 4 * (num_experts + _GROWTH) ** 2

    def begin(self, choice: Choice) -> None:
        state = self._layer(choice.layer)
        if choice.tokens == 1:
            state.step(choice.experts)
        elif choice.experts:
            state.read(choice.experts, choice.counts or (1,), choice.tokens)

    def victim(self, key: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        best, least = None, float("inf")
        for layer, state in self._layers.items():
            for expert in state.ranking():
                old = ExpertKey(layer, expert)
                if evictable(old):
                    worth = state.worth(expert)
                    if worth < least:
                        best, least = old, worth
                    break
        return best

    def admits(self, key: ExpertKey, victim: ExpertKey) -> bool:
        mine = self._layer(key.layer).worth(key.expert)
        return mine >= self._layers[victim.layer].worth(victim.expert)

    def evict(self, key: ExpertKey) -> None:
        self._layers[key.layer].leave(key.expert)

    def admit(self, key: ExpertKey) -> None:
        self._layer(key.layer).enter(key.expert)

    def forget(self, key: ExpertKey) -> None:
        self._layers[key.layer].leave(key.expert)

    def _layer(self, layer: int) -> Layer:
        state = self._layers.get(layer)
        if state is None:
            state = self._layers[layer] = make_layer()
        return state


class Layer(Protocol):
    """What was seen of one layer, and who of it is resident."""

    def step(self, experts: Sequence[int]) -> None:
        """Take in a step of one token."""

    def read(self, experts: Sequence[int], counts: Sequence[int], tokens: int) -> None:
        """Take in a step of many tokens: as if they had come one by one, in any order."""

    def enter(self, expert: int) -> None:
        """Become resident."""

    def leave(self, expert: int) -> None:
        """Stop being resident."""

    def ranking(self) -> Sequence[int]:
        """Return the residents, the least worth first."""

    def worth(self, expert: int) -> float:
        """Return the chance that the next step asks for an expert, and more if this one does."""


def make_layer() -> Layer:
    """Return a layer of which nothing was seen, native where there is a core."""
    if not native.is_available():
        return NumpyLayer()
    layer: Layer = native.core().TransitionLayer(KEPT, FOLLOWING, BEFORE_LAST, UNSURE, IN_USE)
    return layer


class NumpyLayer:
    """A `Layer` without a native core."""

    def __init__(self) -> None:
        self._mean = np.zeros(0, dtype=np.float32)  # [E]
        self._follows = np.zeros((0, 0), dtype=np.float32)  # [E, E]: chosen before, chosen after
        self._seen = np.zeros(0, dtype=np.float32)  # [E]: steps after one that chose it
        self._last: Sequence[int] = ()
        self._past = np.zeros(0, dtype=np.intp)  # of the last step and the one before
        self._weights = np.zeros(0, dtype=np.float32)  # of each of them
        self._now: Sequence[int] = ()
        self._resident: dict[int, None] = {}
        self._worth: list[float] | None = None
        self._ranking: list[int] | None = None

    def step(self, experts: Sequence[int]) -> None:
        """See `Layer`, as for all that follows."""
        chosen = self._note(experts)
        if len(self._past):
            self._follows[self._past[:, None], chosen] += self._weights[:, None]
            self._seen[self._past] += self._weights
        past = dict.fromkeys(self._last, BEFORE_LAST)
        for expert in experts:
            past[expert] = past.get(expert, 0.0) + 1.0
        self._past = np.fromiter(past, np.intp, len(past))
        self._weights = np.fromiter(past.values(), np.float32, len(past))
        self._last = experts
        self._mean *= KEPT
        self._mean[chosen] += 1 - KEPT

    def read(self, experts: Sequence[int], counts: Sequence[int], tokens: int) -> None:
        chosen = self._note(experts)
        kept = KEPT**tokens
        self._mean *= kept
        self._mean[chosen] += (1 - kept) / tokens * np.asarray(counts)
        self._last, self._past, self._weights = (), self._past[:0], self._weights[:0]

    def enter(self, expert: int) -> None:
        self._make_room_for(expert)
        self._resident[expert] = None
        self._ranking = None

    def leave(self, expert: int) -> None:
        del self._resident[expert]
        if self._ranking is not None:
            self._ranking.remove(expert)

    def ranking(self) -> Sequence[int]:
        if self._ranking is None:
            self._ranking = sorted(self._resident, key=self._weigh().__getitem__)
        return self._ranking

    def worth(self, expert: int) -> float:
        self._make_room_for(expert)
        return self._weigh()[expert]

    def _weigh(self) -> list[float]:
        if self._worth is None:
            past, following = self._past, np.zeros_like(self._mean)
            shares = self._weights / (self._seen[past] + UNSURE)
            for share, row in zip(shares, self._follows[past], strict=True):
                following += share * row
            worth: list[float] = (self._mean + FOLLOWING * following).tolist()
            for expert in self._now:
                worth[expert] += IN_USE
            self._worth = worth
        return self._worth

    def _note(self, experts: Sequence[int]) -> NDArray[np.intp]:
        self._make_room_for(max(experts, default=-1))
        self._now = experts
        self._worth = self._ranking = None
        return np.asarray(experts, dtype=np.intp)

    def _make_room_for(self, expert: int) -> None:
        have = len(self._mean)
        if expert < have:
            return
        more = (expert // _GROWTH + 1) * _GROWTH - have
        self._mean = np.pad(self._mean, (0, more))
        self._seen = np.pad(self._seen, (0, more))
        self._follows = np.pad(self._follows, (0, more))
        self._worth = self._ranking = None
