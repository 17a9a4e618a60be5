"""Which expert is in which slot, and who may leave?

The pure half of the mover: keys and slot numbers, no bytes, no threads, no torch. Callers hold one
lock around every call.

Slots are alike; what differs is what a slot counts as:
    region   the share of one MoE layer, or of all; ordered by the region's eviction policy
    spare    the rest; holds guesses, and for the time of their lease demanded experts that find no
             room in their region or are not worth anyone's place there
A guess always lands in a spare slot, so it never evicts an expert that the router chose. When the
router confirms it, the slot is counted to the region from then on (adopt), and the region's victim
gives a slot back: no bytes move. While a prompt is read regions lend slots to the spare ones.

Invariants (`check` proves them): every used slot has one entry; used regions are within their
capacities, less what they lend; spare entries are within `spare_slots`; a locked entry is never
evicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from fate_moe.cache.allocation import Regions
from fate_moe.cache.policy import EvictionPolicy
from fate_moe.errors import CacheError
from fate_moe.telemetry import Counts
from fate_moe.types import Choice, ExpertKey, Phase, Prediction


class Part(Enum):
    """What of a record a slot holds, or a read brings."""

    WHOLE = "whole"
    HEAD = "head"
    """The INT2 expert."""
    REST = "rest"
    """What makes a head whole; the head is there."""


@dataclass(slots=True, eq=False)
class Entry:
    """One expert that has a slot.

    Attributes:
        key: the expert.
        slot: its slot, in [0, S).
        resident: its bytes are complete; until then it is in flight.
        locks: leases on it; a locked entry cannot be evicted.
        spare: counted to the spare slots, not to its layer's region.
        guessed: read because of a guess; stays true after the router confirmed it.
        used: the router asked for it at least once.
        part: what is there of the record if resident, else what is on its way.
        then_rest: a head on its way is not enough; the rest is read next.
    """

    key: ExpertKey
    slot: int
    resident: bool = False
    locks: int = 0
    spare: bool = False
    guessed: bool = False
    used: bool = False
    part: Part = Part.WHOLE
    then_rest: bool = False


class ExpertTable:
    """Key to slot, for all layers of one tier."""

    def __init__(
        self,
        regions: Regions,
        spare_slots: int,
        make_policy: Callable[[int], EvictionPolicy],
    ) -> None:
        """Share out `regions.slots + spare_slots` slots.

        Args:
            regions: slots of each region; 0 is allowed.
            spare_slots: slots for guesses and overflow.
            make_policy: builds the eviction policy of a region, given its capacity.
        """
        self.regions = regions
        self.slots = regions.slots + spare_slots
        self.spare_slots = spare_slots
        self._limits = list(regions.capacities)
        self._lenders: list[int] = []  # regions, one for each slot that is lent
        self.evictions = 0
        self.is_kept = False  # nobody may leave a region now
        self._watchers: list[set[ExpertKey]] = []
        self.on_drop: Callable[[Entry], None] = lambda entry: None
        self._make_policy = make_policy
        self._of_layer = regions.of_layer
        self._policies = [make_policy(c) for c in regions.capacities]
        self._used = [0] * len(regions.capacities)
        self._entries: dict[ExpertKey, Entry] = {}
        self._spare: dict[ExpertKey, Entry] = {}  # oldest first
        self._free = deque(range(self.slots))

    def emptied(self) -> ExpertTable:
        """Return a table of the same shape in which nothing is resident or learned."""
        own = self.spare_slots - len(self._lenders)
        return ExpertTable(self.regions, own, self._make_policy)

    def get(self, key: ExpertKey) -> Entry | None:
        """Return the entry of `key`, resident or in flight, or None."""
        return self._entries.get(key)

    def watch(self, moved: set[ExpertKey]) -> None:
        """Add to `moved`, from now on, whoever comes to lie elsewhere, changes or leaves."""
        self._watchers.append(moved)

    def waits_for(self, key: ExpertKey) -> bool:
        """Say whether an expert has no slot but what a guess that nobody asked for gave it."""
        entry = self._entries.get(key)
        return entry is None or (entry.guessed and not entry.used)

    def begin(self, choice: Choice) -> None:
        """Tell the policy all that a router chose in a step, before the requests for it."""
        if choice.phase is Phase.DECODE:
            self._repay()
        self._policy(choice.layer).begin(choice)

    def expect(self, prediction: Prediction) -> None:
        """Tell the policy which experts of a layer are guessed to be asked for next."""
        self._policy(prediction.layer).expect(prediction)

    def count(
        self, keys: Iterable[ExpertKey], counts: Counts, low: frozenset[int] = frozenset()
    ) -> None:
        """Add requests to counts, before anything is done for them; `low` need a head only."""
        for key in keys:
            counts.requests += 1
            counts.low += key.expert in low
            entry = self._entries.get(key)
            if entry is None:
                counts.misses += 1
                continue
            if entry.part is Part.HEAD and key.expert not in low:
                counts.misses += 1
                counts.partial += 1
                continue
            counts.hits += entry.resident
            counts.late += not entry.resident
            counts.saved += entry.guessed and not entry.used

    def touch(self, entry: Entry) -> None:
        """Tell the policy that the router chose an expert that has a slot."""
        key, policy = entry.key, self._policy(entry.key.layer)
        entry.used = True
        if not entry.spare:
            policy.hit(key)
            return
        policy.miss(key)
        if self._room_in_region(key):
            self._adopt(entry)

    def note_miss(self, key: ExpertKey) -> None:
        """Tell the policy, once per request, that the router chose an expert without a slot."""
        self._policy(key.layer).miss(key)

    def place_demand(self, key: ExpertKey) -> Entry | None:
        """Give a demanded expert a slot: of its region if it is worth one, else a spare one.

        Returns:
            The new entry, in flight, used, unlocked; None when every slot that could serve is
            locked or in flight (try again after an unlock or a landing).
        """
        if self._room_in_region(key):
            entry = Entry(key, self._free.popleft(), used=True)
            self._join_region(entry)
        elif self._room_in_spare(lambda old: True):
            entry = Entry(key, self._free.popleft(), spare=True, used=True)
            self._spare[key] = entry
        elif self._room_in_region(key, at_any_cost=True):
            entry = Entry(key, self._free.popleft(), used=True)
            self._join_region(entry)
        else:
            return None
        self._entries[key] = entry
        return entry

    def place_guess(self, key: ExpertKey) -> Entry | None:
        """Give a guessed expert a spare slot, or None.

        Evicts only guesses for other layers that nobody asked for: never an expert that the
        router chose, never a guess as fresh as itself.
        """
        if not self._room_in_spare(lambda old: old.key.layer != key.layer):
            return None
        entry = Entry(key, self._free.popleft(), spare=True, guessed=True)
        self._entries[key] = self._spare[key] = entry
        return entry

    def lend(self, wanted: int, layer: int) -> None:
        """Let regions lend slots until `wanted` are spare; the next decode step gives them back.

        A prompt needs nearly all experts of the next layer, so its guesses are as good as demands:
        spare slots should take all that is read while this layer computes. Whose turn in this
        chunk is over lends first, no region more than half of its slots.

        Args:
            layer: the layer that is guessed for; the one before it is being computed.
        """
        layers = len(self._of_layer)
        for back in range(2, layers):
            of = (layer - back) % layers
            region = self._of_layer[of]
            while self._limits[region] > self.regions.capacities[region] / 2:
                # Who comes in its place does not matter: nobody does.
                newcomer = ExpertKey(of, 0)
                if self.spare_slots >= wanted or not self._room_in_region(newcomer, True):
                    break
                self._limits[region] -= 1
                self.spare_slots += 1
                self._lenders.append(region)

    def landed(self, entry: Entry) -> None:
        """Note that what was on its way to an entry is there."""
        entry.resident = True
        if entry.part is Part.REST:
            entry.part = Part.WHOLE
        self._note_moved(entry.key)
        self._drop_homeless(entry)

    def upgrade(self, entry: Entry) -> None:
        """Note that the rest is being read of an entry whose head is there."""
        entry.resident, entry.part = False, Part.REST
        self._note_moved(entry.key)

    def give_back(self, entry: Entry) -> None:
        """Note that a read was taken back before it began: what was there is there."""
        if entry.part is Part.REST:
            entry.resident, entry.part = True, Part.HEAD
            self._drop_homeless(entry)
        else:
            self.drop(entry)

    def unlock(self, entry: Entry) -> None:
        """End one lease on an entry."""
        entry.locks -= 1
        self._drop_homeless(entry)

    def place_resident(self, key: ExpertKey) -> Entry | None:
        """Give an expert a free slot of its region before any request (preload), or None."""
        region = self._of_layer[key.layer]
        if self._used[region] >= self._limits[region]:
            return None
        entry = Entry(key, self._free.popleft())
        self._join_region(entry)
        self._entries[key] = entry
        return entry

    def drop(self, entry: Entry) -> None:
        """Take an entry out whose read failed or was cancelled; its slot is free again."""
        if entry.spare:
            del self._spare[entry.key]
        else:
            self._policy(entry.key.layer).forget(entry.key)
            self._used[self._of_layer[entry.key.layer]] -= 1
        self._release_slot(entry)

    def entries(self) -> list[Entry]:
        """Return every entry, resident or in flight."""
        return list(self._entries.values())

    def check(self) -> None:
        """Prove the invariants.

        Raises:
            CacheError: one is broken; names it.
        """
        slots = [e.slot for e in self._entries.values()] + list(self._free)
        total = sum(self._limits) + self.spare_slots
        if sorted(slots) != list(range(total)):
            raise CacheError(f"slots: {total} exist, {len(slots)} accounted for, or one twice")
        homes = [self._of_layer[k.layer] for k, e in self._entries.items() if not e.spare]
        for region, limit in enumerate(self._limits):
            used = homes.count(region)
            if used != self._used[region] or used > limit:
                raise CacheError(f"region {region}: {used} slots used, {limit} allowed")
        spare = [k for k, e in self._entries.items() if e.spare]
        if set(spare) != set(self._spare) or len(spare) > self.spare_slots:
            raise CacheError(f"spare: {len(spare)} slots used, {self.spare_slots} allowed")

    def _drop_homeless(self, entry: Entry) -> None:
        # The policy gave this demanded expert no place; it was here for its lease only.
        if entry.spare and entry.used and entry.resident and not entry.locks:
            self.drop(entry)

    def _policy(self, layer: int) -> EvictionPolicy:
        return self._policies[self._of_layer[layer]]

    def _room_in_region(self, key: ExpertKey, at_any_cost: bool = False) -> bool:
        region = self._of_layer[key.layer]
        if self._used[region] < self._limits[region]:
            return True
        policy = self._policies[region]
        victim = policy.victim(key, self._is_evictable)
        if victim is None or not (at_any_cost or policy.admits(key, victim)):
            return False
        policy.evict(victim)
        self._used[region] -= 1
        self.evictions += 1
        self._release_slot(self._entries[victim])
        return True

    def _repay(self) -> None:
        while self._lenders and self._room_in_spare(lambda old: True):
            self.spare_slots -= 1
            self._limits[self._lenders.pop()] += 1

    def _room_in_spare(self, may_go: Callable[[Entry], bool]) -> bool:
        if len(self._spare) < self.spare_slots:
            return True
        for old in self._spare.values():
            if old.resident and not old.locks and may_go(old):
                del self._spare[old.key]
                self._release_slot(old)
                return True
        return False

    def _is_evictable(self, key: ExpertKey) -> bool:
        entry = self._entries[key]
        return entry.resident and not entry.locks and not self.is_kept

    def _join_region(self, entry: Entry) -> None:
        self._policy(entry.key.layer).admit(entry.key)
        self._used[self._of_layer[entry.key.layer]] += 1

    def _adopt(self, entry: Entry) -> None:
        del self._spare[entry.key]
        entry.spare = False
        self._note_moved(entry.key)
        self._join_region(entry)

    def _release_slot(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._free.append(entry.slot)
        self._note_moved(entry.key)
        self.on_drop(entry)

    def _note_moved(self, key: ExpertKey) -> None:
        for moved in self._watchers:
            moved.add(key)
