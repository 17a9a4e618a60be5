"""Which layers does a token pass without a lease of their own?

Those whose chosen experts are all resident already. While tokens pass, the mover is held as by a
lease, and nobody leaves a region, not even for another thread's prompt that wants to borrow slots.
What a lease would have told the table, the counts and the clock is told afterwards, layer by layer,
in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fate_moe.cache.table import Entry, ExpertTable, Part
from fate_moe.prefetch.mover import Mover
from fate_moe.types import Choice, ExpertKey, Phase

Place = tuple[ExpertKey, int | None]
"""An expert and the slot that a token may compute it from; None: there is none."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One layer that a token has passed.

    Attributes:
        layer, experts: what its router chose, ascending.
        chosen_s: when, in seconds of `time.perf_counter`.
        took_s: from then until the experts were computed.
    """

    layer: int
    experts: Sequence[int]
    chosen_s: float
    took_s: float


class Passing:
    """Lets tokens pass some layers of an engine. Used by one thread at a time."""

    def __init__(
        self,
        mover: Mover,
        learn: Callable[[int, Sequence[int]], None],
        experts: Mapping[int, int],
    ) -> None:
        """Hold nothing yet.

        Args:
            mover: of the engine.
            learn: is told the layer and the experts of whatever is passed, as the predictor is.
            experts: E of each of the layers, by its number.
        """
        self._mover = mover
        self._learn = learn
        self._experts = dict(experts)
        self._table: ExpertTable | None = None
        self._moved: set[ExpertKey] = set()

    def guess_level(self) -> int:
        """Say how much is guessed now for each layer; see `Benefit`."""
        return self._mover.guess_level(1)

    def open(self, place: Callable[[list[Place]], None]) -> None:
        """Let nobody leave its slot until `close`. Waits while another thread computes.

        Args:
            place: is told who came or left since the last time; at first about every expert.
        """
        self._mover.begin_lease()
        try:
            # An interrupt tears the section: the next one finds a new table, and tells all again.
            with self._mover.section:
                table = self._mover.table
                if table is not self._table:
                    counts = self._experts.items()
                    self._moved = {ExpertKey(at, e) for at, count in counts for e in range(count)}
                    table.watch(self._moved)
                    self._table = table
                mine = [key for key in self._moved if key.layer in self._experts]
                place([(key, _slot(table.get(key))) for key in mine])
                self._moved.clear()
                table.is_kept = True
        except BaseException:
            self._mover.end_lease()
            raise

    def close(self, passed: Sequence[Passed]) -> None:
        """Let go, and book the layers that were passed since `open`."""
        try:
            with self._mover.section:
                self._mover.table.is_kept = False
                for one in passed:
                    self._book(one)
        finally:
            self._mover.end_lease()
        for one in passed:
            self._learn(one.layer, one.experts)

    def _book(self, one: Passed) -> None:
        mover, table = self._mover, self._mover.table
        mover.turns.passed(one.layer, one.chosen_s, one.took_s)
        keys = [ExpertKey(one.layer, expert) for expert in one.experts]
        table.count(keys, mover.telemetry.counts[Phase.DECODE][one.layer])
        table.begin(Choice(one.layer, one.experts, 1))
        for key in keys:
            entry = table.get(key)
            if entry is not None:  # always: nobody has left
                table.touch(entry)


def _slot(entry: Entry | None) -> int | None:
    if entry is None or entry.spare or not entry.resident or entry.part is not Part.WHOLE:
        return None  # what is spare may be a guess that a lease has to confirm
    return entry.slot
