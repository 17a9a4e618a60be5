"""Which experts of a layer would cost no read now?"""

from __future__ import annotations

from collections.abc import Iterable

from fate_moe.cache.table import Part
from fate_moe.prefetch.mover import Mover
from fate_moe.types import ExpertKey, Phase


class There:
    """The experts of one layer that are whole in their slots, or on their way so.

    What is on its way counts, too: what has landed by itself looks like that until the next lease.

    Attributes:
        num_experts: E.
    """

    def __init__(self, mover: Mover, layer: int, num_experts: int) -> None:
        self._mover, self._layer = mover, layer
        self.num_experts = num_experts

    def among(self, experts: Iterable[int]) -> list[int]:
        """Return those of `experts` that are there."""
        with self._mover.section:
            get, layer = self._mover.table.get, self._layer
            found = [(expert, get(ExpertKey(layer, expert))) for expert in experts]
            return [e for e, entry in found if entry is not None and entry.part is not Part.HEAD]

    def rerouted(self, count: int) -> None:
        """Count so many experts of a token that were chosen for being there."""
        with self._mover.section:
            self._mover.telemetry.counts[Phase.DECODE][self._layer].rerouted += count
