"""How often would the router have found its experts resident? The cache alone, no time.

Either requests come one by one, as in the literature on caches: nothing is locked, every miss
evicts at once; so counts can be set beside those of any other simulator. Or with leases, as in the
engine: what a step asks for is locked until the step is done, what is not worth a place in its
region gets none, and layers that fit as a whole are there from the start. Guesses are there before
the layer they are for; those that nobody asked for are gone after it. With a link and its time, see
`timeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fate_moe.cache.allocation import Regions
from fate_moe.cache.policy import EvictionPolicy
from fate_moe.sim.guesses import Guesser
from fate_moe.sim.trace import Trace
from fate_moe.telemetry import Counts
from fate_moe.types import Choice, ExpertKey, Phase, Progress, no_progress

MakePolicy = Callable[[int], EvictionPolicy]
_TOLD_EVERY = 64  # steps
_UNLIMITED = 1 << 30


@dataclass(slots=True)
class Replay:
    """What happened.

    Attributes:
        counts: by phase and layer.
        guesses, guesses_used: experts read because of a guess, and those asked for afterwards.
        evictions: from regions.
        bytes_demand, bytes_speculated, bytes_wasted: as in the engine's report.
    """

    layers: int
    counts: dict[Phase, list[Counts]] = field(default_factory=dict)
    guesses: int = 0
    guesses_used: int = 0
    evictions: int = 0
    bytes_demand: int = 0
    bytes_speculated: int = 0
    bytes_wasted: int = 0

    def __post_init__(self) -> None:
        self.counts = {phase: [Counts() for _ in range(self.layers)] for phase in Phase}

    def count(self, choice: Choice, resident: int, read: set[int], record_bytes: int) -> None:
        """Count a layer's requests in a step: those resident, those read ahead, the rest."""
        counts = self.counts[choice.phase][choice.layer]
        saved = len(read.intersection(choice.experts)) if read else 0
        misses = len(choice.experts) - resident - saved
        counts.requests += len(choice.experts)
        counts.hits += resident + saved
        counts.saved += saved
        counts.misses += misses
        self.guesses += len(read)
        self.guesses_used += saved
        self.bytes_demand += misses * record_bytes
        self.bytes_speculated += len(read) * record_bytes
        self.bytes_wasted += (len(read) - saved) * record_bytes

    def total(self, phase: Phase | None = None) -> Counts:
        """Sum over the layers, and over the phases unless one is named."""
        whole = Counts()
        for one, per_layer in self.counts.items():
            if phase in (None, one):
                for counts in per_layer:
                    whole.add(counts)
        return whole


def replay(
    trace: Trace,
    regions: Regions,
    make_policy: MakePolicy,
    guesser: Guesser,
    record_bytes: Sequence[int],
    *,
    leases: bool,
    spare_slots: int = _UNLIMITED,
    progress: Progress = no_progress,
) -> Replay:
    """Replay a trace against a cache.

    Args:
        regions: the slots.
        make_policy: builds the policy of a region, given its capacity.
        guesser: says what is guessed for each layer.
        record_bytes: size of a record of each layer, [L].
        leases: what a step asks for is locked until it is done.
        spare_slots: with leases, how many experts of a step need no place in their region.
    Returns:
        Counts; nothing is ever late.
    """
    found = Replay(len(trace.experts))
    caches, layers = regions_of(trace, regions, make_policy, preloads=leases)
    for number, step in enumerate(trace.steps):
        if number % _TOLD_EVERY == 0:
            progress("replaying", number, len(trace.steps))
        per_layer = found.counts[step.phase]
        for choice, (own, cache) in zip(step.choices, layers, strict=True):
            layer, read = choice.layer, set[int]()
            guess = guesser.guess(number, layer)
            if guess is not None:
                cache.policy.expect(guess)
                read = {e for e in guess.ranked if own[e] not in cache.resident}
                per_layer[layer].add_guess(guess, choice.experts)
            cache.policy.begin(choice)
            if leases:
                hits = lease(cache, choice, own, read, spare_slots)
            else:
                hits = _ask(cache, choice, own)
            found.count(choice, hits, read, record_bytes[layer])
    progress("replaying", len(trace.steps), len(trace.steps))
    found.evictions = sum(cache.evictions for cache in caches)
    return found


class Region:
    """Slots that share one fate."""

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        self.capacity = capacity
        self.policy = policy
        self.resident: set[ExpertKey] = set()
        self.evictions = 0

    def preload(self, keys: Sequence[ExpertKey]) -> None:
        """Hold experts before anyone asks for them."""
        for key in keys:
            self.policy.admit(key)
        self.resident.update(keys)

    def place(self, key: ExpertKey) -> None:
        """Keep an expert that was read, at anyone's cost."""
        self._replace(key, self.policy.victim(key, _anyone) if self._is_full() else None)

    def place_leased(self, key: ExpertKey, locked: frozenset[ExpertKey], spare: int) -> int:
        """Keep an expert that was read, or let it use a spare slot; return how many are left."""
        if not self._is_full():
            self._replace(key, None)
            return spare
        victim = self.policy.victim(key, lambda old: old not in locked)
        if victim is not None and (spare < 1 or self.policy.admits(key, victim)):
            self._replace(key, victim)
            return spare
        return spare - 1

    def _is_full(self) -> bool:
        return len(self.resident) >= self.capacity

    def _replace(self, key: ExpertKey, victim: ExpertKey | None) -> None:
        if victim is not None:
            self.policy.evict(victim)
            self.resident.remove(victim)
            self.evictions += 1
        elif self._is_full():  # a region without slots
            return
        self.policy.admit(key)
        self.resident.add(key)


def regions_of(
    trace: Trace, regions: Regions, make_policy: MakePolicy, *, preloads: bool = True
) -> tuple[list[Region], list[tuple[list[ExpertKey], Region]]]:
    """Make empty regions.

    Args:
        preloads: layers that fit as a whole are there from the start.
    Returns:
        The regions, and for each layer its experts' keys and its region, [L].
    """
    caches = [Region(capacity, make_policy(capacity)) for capacity in regions.capacities]
    keys = [[ExpertKey(layer, e) for e in range(n)] for layer, n in enumerate(trace.experts)]
    layers = [(keys[layer], caches[region]) for layer, region in enumerate(regions.of_layer)]
    for layer, (own, cache) in enumerate(layers):
        if preloads and regions.holds_whole(layer, trace.experts):
            cache.preload(own)
    return caches, layers


def _anyone(key: ExpertKey) -> bool:
    return True


def _ask(cache: Region, choice: Choice, keys: Sequence[ExpertKey]) -> int:
    """Ask for all that a layer needs in a step, one by one; return the hits."""
    resident, policy = cache.resident, cache.policy
    hits = 0
    for expert in choice.experts:
        key = keys[expert]
        if key in resident:
            hits += 1
            policy.hit(key)
        else:
            policy.miss(key)
            cache.place(key)
    return hits


def lease(
    cache: Region, choice: Choice, keys: Sequence[ExpertKey], read: set[int], spare: int
) -> int:
    """Ask for all that a layer needs in a step at once; return how many were resident.

    In the order of the engine's leases: what was read ahead finds its place when it is asked for,
    what is missing after everyone was asked for.
    """
    resident, policy = cache.resident, cache.policy
    locked = frozenset(keys[expert] for expert in choice.experts)
    missing = []
    hits = 0
    for expert in choice.experts:
        key = keys[expert]
        if key in resident:
            hits += 1
            policy.hit(key)
            continue
        policy.miss(key)
        if expert in read:
            cache.place_leased(key, locked, 1)  # its slot is there
        else:
            missing.append(key)
    for key in missing:
        spare = cache.place_leased(key, locked, spare)
    return hits
