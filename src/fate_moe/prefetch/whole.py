"""What do many layers hold at once, while a token goes through them in one piece?

All of their experts, where all are resident: the regions of such layers hold them whole, so nobody
ever has to leave. Only an interrupt can empty them (see the mover's words); then layers are
computed one by one until each expert has been asked for again.
"""

from __future__ import annotations

from fate_moe.cache.table import ExpertTable, Part
from fate_moe.prefetch.mover import Mover
from fate_moe.types import ExpertKey, Phase


class Whole:
    """The experts of some layers, to be held all together. Used by one thread at a time.

    Attributes:
        slots: of each of the layers, the slot of each expert, as found last.
    """

    def __init__(self, mover: Mover, experts: dict[int, int]) -> None:
        """Hold nothing yet.

        Args:
            mover: of the engine.
            experts: E of each of the layers, by its number.
        """
        self._mover = mover
        self._experts = experts
        self._seen: tuple[ExpertTable, int] | None = None
        self.slots: list[list[int]] = []

    def open(self) -> bool:
        """Hold all experts, as a lease does; False, and nothing is held, where one is missing.

        Waits while another thread computes.
        """
        self._mover.begin_lease()
        try:
            with self._mover.section:
                found = self._find()
        except BaseException:
            self._mover.end_lease()
            raise
        if not found:
            self._mover.end_lease()
        return found

    def close(self, chosen: int) -> None:
        """Let go.

        Args:
            chosen: experts that a token was routed to in each layer; 0 where none was computed.
        """
        try:
            with self._mover.section:
                per_layer = self._mover.telemetry.counts[Phase.DECODE]
                for layer in self._experts if chosen else ():
                    per_layer[layer].requests += chosen
                    per_layer[layer].hits += chosen
        finally:
            self._mover.end_lease()

    def _find(self) -> bool:
        table = self._mover.table
        if self._seen == (table, table.departures):
            return True  # nobody has left: all are where they were
        self._seen = None
        if table.held < sum(self._experts.values()):
            return False
        slots = []
        for layer, count in self._experts.items():
            entries = [table.get(ExpertKey(layer, expert)) for expert in range(count)]
            there = [e for e in entries if e is not None and e.resident and e.part is Part.WHOLE]
            if len(there) < count:
                return False
            slots.append([entry.slot for entry in there])
        self._seen, self.slots = (table, table.departures), slots
        return True
