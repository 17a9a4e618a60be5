"""How many guessed reads does the computing of one layer hide?

A turn lasts from one layer's demand to the next layer's. What it did not spend waiting is the time
that a guess made in it can hide behind. Pure; callers hold the mover's lock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fate_moe.prefetch.benefit import Benefit
from fate_moe.telemetry import LinkMeter, MovingAverage, Telemetry
from fate_moe.types import Phase


class Turns:
    """The turn that is on, and what the ones before it took."""

    def __init__(
        self, window: int | None, link: LinkMeter, telemetry: Telemetry, benefit: Benefit
    ) -> None:
        """Start before the first turn.

        Args:
            window: most guesses per layer; None = as many as one layer's computing time covers.
            link: how fast guesses come in.
            telemetry: knows the time spent waiting.
            benefit: told how long decode steps take, from the first layer's demand to the last's.
        """
        self.compute_s = {phase: MovingAverage() for phase in Phase}
        self._window = window
        self._link = link
        self._telemetry = telemetry
        self._benefit = benefit
        self._step_began_s: float | None = None
        self._now: _Turn | None = None

    @property
    def phase(self) -> Phase | None:
        """Of the turn that is on; None before the first one."""
        return None if self._now is None else self._now.phase

    def begin(self, layer: int, phase: Phase) -> None:
        """Begin the turn of `layer`."""
        self._begin(layer, phase, time.perf_counter())

    def passed(self, layer: int, chosen_s: float, took_s: float) -> None:
        """Book a turn of decode without a lease, after the fact.

        Args:
            chosen_s: when the layer's experts were chosen, in seconds of `time.perf_counter`.
            took_s: until they were computed.
        """
        self._begin(layer, Phase.DECODE, chosen_s, is_leased=False)
        self._telemetry.leases[Phase.DECODE].lease_s += took_s

    def _begin(self, layer: int, phase: Phase, now: float, is_leased: bool = True) -> None:
        # What lies between two forward steps (sampling, a person who thinks) is no turn.
        stalled, last = self._telemetry.stall_s, self._now
        if last is not None and layer > last.layer:
            self.compute_s[last.phase].add(now - last.began_s - (stalled - last.stalled_s))
        if layer == 0:
            self.compute_s[Phase.PREFILL] = MovingAverage()  # a chunk has its own length
            self._step_began_s = now if phase is Phase.DECODE else None
        elif layer == self._telemetry.layers - 1 and self._step_began_s is not None:
            self._benefit.end_step(now - self._step_began_s)
            self._step_began_s = None
        self._now = _Turn(layer, phase, now, stalled, is_leased)

    def end_lease(self) -> None:
        """Book how long the turn's lease was open, once, and what of it was spent waiting."""
        if self._now is not None and self._now.is_leased:
            self._now.is_leased = False
            booked = self._telemetry.leases[self._now.phase]
            booked.lease_s += time.perf_counter() - self._now.began_s
            # Another thread may have set the counts to zero meanwhile.
            booked.stall_s += max(0.0, self._telemetry.stall_s - self._now.stalled_s)

    def window(self, read_bytes: int, spare_slots: int) -> int:
        """Return the most guesses of `read_bytes` each that this turn should queue."""
        if self._window is not None:
            return self._window
        compute_s = None if self._now is None else self.compute_s[self._now.phase].value
        rate = self._link.bytes_per_s
        if rate is None or compute_s is None:
            return spare_slots
        return int(compute_s * rate / read_bytes)

    def least_chance(self, read_bytes: int) -> float:
        """Return how likely a guess beyond the window has to be right; over 1: none is worth it."""
        compute_s = None if self._now is None else self.compute_s[self._now.phase].value
        rate = self._link.bytes_per_s
        if self._window is not None or rate is None or compute_s is None:
            return 2.0
        return least_chance(read_bytes / rate, compute_s)


def least_chance(read_s: float, compute_s: float) -> float:
    """Return how likely a guess beyond the window has to be right to be worth its read.

    A right one begins its read a turn, `compute_s`, earlier; a wrong one holds up the next demand
    for as long as it is read.
    """
    return read_s / (read_s + min(compute_s, read_s))


@dataclass(slots=True)
class _Turn:
    layer: int
    phase: Phase
    began_s: float
    stalled_s: float
    is_leased: bool
