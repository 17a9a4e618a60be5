"""How fast would a token be? A replay with a link that takes time.

One link serves reads one after the other: what a layer needs first, guesses for the next layer in
the time that is left; a read that has begun is finished. A layer computes what is resident while
records come in, where the engine has threads read them, and waits for the rest. Guesses are counted
as the engine counts them: landed before the router asks = hit, later = late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fate_moe.cache.allocation import Regions
from fate_moe.prefetch.turns import least_chance
from fate_moe.prefetch.wishes import Wishes
from fate_moe.sim.guesses import Guesser
from fate_moe.sim.replay import MakePolicy, Replay, lease, regions_of
from fate_moe.sim.trace import Trace
from fate_moe.types import Choice, Phase, Prediction, Progress, no_progress

_TOLD_EVERY = 16  # steps


@dataclass(frozen=True, slots=True)
class Link:
    """What reads and computing take.

    Attributes:
        bytes_s: bytes per second.
        latency_s: of each read, before its first byte.
        token_s: computing one token with everything resident, which passes all layers.
        guess_s: guessing for all layers of a token.
        read_s: that each read takes from computing, on the processor, beside its time on the link.
        experts_s: of token_s, computing routed experts; None: all of it. Only that can be done
            while the layer's own reads come in: the rest needs what the experts computed.
        stop_s: of each layer that is not passed: one that misses an expert, and any where guesses
            are made. It comes before the layer's reads are asked for.
    """

    bytes_s: float
    token_s: float
    latency_s: float = 0.0
    guess_s: float = 0.0
    read_s: float = 0.0
    experts_s: float | None = None
    stop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Timed:
    """What happened while decoding, and how fast.

    Attributes:
        found: counts of the decode steps.
        seconds: of all of them.
        stall_s: of it, waiting for bytes.
        steps: how many.
        stops: layers that were not passed.
    """

    found: Replay
    seconds: float
    stall_s: float
    steps: int
    stops: int

    @property
    def tok_s(self) -> float:
        """Tokens per second."""
        return self.steps / self.seconds if self.seconds else 0.0


def time_decode(
    trace: Trace,
    regions: Regions,
    make_policy: MakePolicy,
    guesser: Guesser,
    record_bytes: Sequence[int],
    link: Link,
    *,
    spare_slots: int,
    progress: Progress = no_progress,
) -> Timed:
    """Replay a trace on a link; prompts fill the cache and take no time.

    Args:
        as for `replay`; spare_slots: also the most guesses for a layer.
    """
    run = _Run(trace, regions, make_policy, record_bytes, link, spare_slots)
    steps = 0
    for number, step in enumerate(trace.steps):
        if number % _TOLD_EVERY == 0:
            progress("replaying", number, len(trace.steps))
        is_timed = step.phase is Phase.DECODE
        steps += is_timed
        for choice in step.choices:
            has_next = choice.layer + 1 < len(trace.experts)
            guess = guesser.guess(number, choice.layer + 1) if is_timed and has_next else None
            run.layer(choice, guess, is_timed=is_timed)
    progress("replaying", len(trace.steps), len(trace.steps))
    run.found.evictions = sum(cache.evictions for cache in run.caches)
    return Timed(run.found, run.now_s, run.stall_s, steps, run.stops)


@dataclass(slots=True)
class _Read:
    begins_s: float
    ends_s: float


class _Run:
    """The clock, the link and the cache."""

    def __init__(
        self,
        trace: Trace,
        regions: Regions,
        make_policy: MakePolicy,
        record_bytes: Sequence[int],
        link: Link,
        spare_slots: int,
    ) -> None:
        self.found = Replay(len(trace.experts))
        self.caches, self._layers = regions_of(trace, regions, make_policy)
        self.now_s = self.stall_s = 0.0
        self.stops = 0
        self._link = link
        self._layer_s = link.token_s / len(trace.experts)
        experts_s = link.token_s if link.experts_s is None else link.experts_s
        self._experts_s = min(experts_s, link.token_s) / len(trace.experts)
        self._guess_s = link.guess_s / len(trace.experts)
        self._record_bytes = record_bytes
        self._spare = spare_slots
        self._free_s = 0.0  # when the link has finished what it has begun
        self._reads: dict[int, _Read] = {}  # guessed for the layer that comes next
        self._guess: Prediction | None = None
        self._wishes = Wishes()

    def layer(self, choice: Choice, guess: Prediction | None, *, is_timed: bool) -> None:
        """Let one layer ask, compute and guess; `guess` is for the next one."""
        keys, cache = self._layers[choice.layer]
        size = self._record_bytes[choice.layer]
        is_passed = all(keys[e] in cache.resident for e in choice.experts)
        if is_timed and not (is_passed and guess is None and self._guess is None):
            self.stops += 1
            self.now_s += self._link.stop_s
        began_s = self.now_s
        reads, self._reads = self._reads, {}
        begun = {e: read for e, read in reads.items() if read.begins_s < began_s}
        asked_for = set(choice.experts)
        kept = {e for e in reads if e in begun or e in asked_for}
        self._free_s = max([began_s, *(read.ends_s for read in begun.values())])
        if is_timed and self._guess is not None:
            self._wishes.sureness.learn(
                self._guess, choice, lambda key: keys[key.expert] not in cache.resident
            )
        cache.policy.begin(choice)
        missing = [e for e in choice.experts if keys[e] not in cache.resident and e not in kept]
        resident = lease(cache, choice, keys, kept & asked_for, self._spare)
        if not is_timed:
            return
        landings = [begun[e].ends_s for e in asked_for if e in begun]
        promoted = [e for e in choice.experts if e in kept and e not in begun]
        demands = [self._serve(size) for _ in (*promoted, *missing)]
        self._count(choice, resident, begun, kept, size)
        read_s = len(demands) * self._link.read_s
        self.now_s = self._compute(began_s, landings + demands, read_s, len(choice.experts))
        self._guess_ahead(guess, began_s)

    def _serve(self, size: int) -> float:
        self._free_s += self._link.latency_s + size / self._link.bytes_s
        return self._free_s

    def _compute(self, began_s: float, landings: list[float], read_s: float, experts: int) -> float:
        """Return when the layer is done, and book what it waited."""
        done_s = began_s + self._experts_s
        last_s = max(landings, default=began_s)
        if last_s > began_s:
            # The last one to land is computed when it has landed.
            done_s = max(done_s, last_s + self._experts_s / (experts + 1))
        self.stall_s += max(0.0, done_s - began_s - self._experts_s)
        # What reads take comes before they are asked for and after they have landed: measured, it
        # makes no waiting shorter.
        return done_s + read_s + self._layer_s - self._experts_s

    def _guess_ahead(self, guess: Prediction | None, began_s: float) -> None:
        self._guess = guess
        if guess is None:
            return
        self.now_s += self._guess_s
        keys, cache = self._layers[guess.layer]
        size = self._record_bytes[guess.layer]
        read_s, at_s = self._link.latency_s + size / self._link.bytes_s, max(self._free_s, began_s)
        window = int(self._layer_s * self._link.bytes_s / size)
        self._wishes.open(window, least_chance(read_s, self._layer_s))
        self._wishes.add(guess)
        while len(self._reads) < self._spare and (key := self._wishes.first()) is not None:
            if keys[key.expert] not in cache.resident:
                self._reads[key.expert] = _Read(at_s, at_s + read_s)
                at_s += read_s
                self._wishes.spend()
            self._wishes.pop()
        self._wishes.clear()
        for read in self._reads.values():
            if read.begins_s < self.now_s:  # what has not begun by then is no read so far
                self.now_s += self._link.read_s

    def _count(
        self, choice: Choice, resident: int, begun: dict[int, _Read], kept: set[int], size: int
    ) -> None:
        found, counts = self.found, self.found.counts[choice.phase][choice.layer]
        asked_for, now_s = set(choice.experts), self.now_s
        landed = sum(e in begun and begun[e].ends_s <= now_s for e in asked_for)
        late = len(kept & asked_for) - landed
        misses = len(asked_for) - resident - landed - late
        counts.requests += len(asked_for)
        counts.hits += resident + landed
        counts.late += late
        counts.misses += misses
        counts.saved += landed + late
        if self._guess is not None:
            counts.add_guess(self._guess, choice.experts)
        found.guesses += len(kept)
        found.guesses_used += len(kept & asked_for)
        found.bytes_demand += misses * size
        found.bytes_speculated += len(kept) * size
        found.bytes_wasted += len(kept - asked_for) * size
