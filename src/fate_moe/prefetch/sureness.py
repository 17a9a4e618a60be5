"""How likely is a guess right that has to be read?

What is resident is mostly what is asked for often, so guesses that cost a read are right less often
than guesses at large. Counted by rank, over all layers: the first is the surest. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from fate_moe.types import Choice, ExpertKey, Prediction

KEPT = 0.99  # of what was seen, with every guess of a rank
UNSURE = 2.0  # guesses that count as wrong before any was seen


class Sureness:
    """The share of guesses that came true, by rank."""

    def __init__(self) -> None:
        self._right: list[float] = []
        self._seen: list[float] = []

    def chance(self, rank: int) -> float:
        """Return how likely the guess at a rank, from 0, is right."""
        if rank >= len(self._seen):
            return 0.0
        return self._right[rank] / (self._seen[rank] + UNSURE)

    def learn(
        self, guess: Prediction, choice: Choice, had_to_be_read: Callable[[ExpertKey], bool]
    ) -> None:
        """Take in what a router chose, before anything is done for it.

        Args:
            guess: for the layer of `choice`.
            had_to_be_read: whether nothing but a guess could have brought an expert by now.
        """
        chosen, layer = set(choice.experts), choice.layer
        more = len(guess.ranked) - len(self._seen)
        self._seen += [0.0] * more
        self._right += [0.0] * more
        for rank, expert in enumerate(guess.ranked):
            if had_to_be_read(ExpertKey(layer, expert)):
                self._seen[rank] = KEPT * self._seen[rank] + 1
                self._right[rank] = KEPT * self._right[rank] + (expert in chosen)
