"""The table of slots as a state machine: any order of events keeps its invariants."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fate_moe.cache import Entry, ExpertTable, make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.prefetch.passing import _slot
from fate_moe.types import Choice, ExpertKey

LAYERS, EXPERTS, SPARE = 3, 6, 3
keys = st.builds(ExpertKey, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = ExpertTable(
            Regions.per_layer([4, 0, 3]), SPARE, lambda c: make_cache("arc", c)
        )
        self.moved: set[ExpertKey] = set()
        self.table.watch(self.moved)
        self.seen: dict[ExpertKey, int | None] = {}
        self.in_flight: list[Entry] = []
        self.locked: list[Entry] = []

    def _is_protected(self, entry: Entry) -> bool:
        return bool(entry.locks) or not entry.resident

    def _chosen_residents(self) -> set[ExpertKey]:
        return {e.key for e in self.table.entries() if e.used or e.locks}

    @rule(key=keys)
    def guess(self, key: ExpertKey) -> None:
        if self.table.get(key) is not None:
            return
        chosen = self._chosen_residents()
        evictions = self.table.evictions
        entry = self.table.place_guess(key)
        # A guess evicts neither what the router chose nor what is leased.
        assert chosen <= {e.key for e in self.table.entries()}
        assert self.table.evictions == evictions
        if entry is not None:
            self.in_flight.append(entry)

    @rule(key=keys)
    def demand(self, key: ExpertKey) -> None:
        protected = {e.key for e in self.table.entries() if self._is_protected(e)}
        entry = self.table.get(key)
        if entry is None:
            self.table.note_miss(key)
            entry = self.table.place_demand(key)
            if entry is None:
                return
            self.in_flight.append(entry)
            entry.locks += 1
        else:
            entry.locks += 1
            self.table.touch(entry)
        self.locked.append(entry)
        assert protected <= {e.key for e in self.table.entries()}

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(entry)
        self.table.landed(entry)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(entry)
        self.locked = [e for e in self.locked if e is not entry]
        self.table.drop(entry)

    @rule(data=st.data())
    def upgrade(self, data: st.DataObject) -> None:
        there = [e for e in self.table.entries() if e.resident and not e.locks]
        if there:
            self.in_flight.append(data.draw(st.sampled_from(there)))
            self.table.upgrade(self.in_flight[-1])

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.locked))
        self.locked.remove(entry)
        self.table.unlock(entry)

    @rule(key=keys)
    def preload(self, key: ExpertKey) -> None:
        if self.table.get(key) is None:
            entry = self.table.place_resident(key)
            if entry is not None:
                self.in_flight.append(entry)

    @rule(wanted=st.integers(0, 9), layer=st.integers(0, LAYERS - 1))
    def lend(self, wanted: int, layer: int) -> None:
        protected = {e.key for e in self.table.entries() if self._is_protected(e) or e.spare}
        before = self.table.spare_slots
        self.table.lend(wanted, layer)
        assert before <= self.table.spare_slots <= max(wanted, before)
        assert protected <= {e.key for e in self.table.entries()}

    @rule(layer=st.integers(0, LAYERS - 1))
    def decode(self, layer: int) -> None:
        protected = {e.key for e in self.table.entries() if self._is_protected(e)}
        self.table.begin(Choice(layer, [0], 1))
        assert protected <= {e.key for e in self.table.entries()}
        if not protected:
            assert self.table.spare_slots == SPARE

    @invariant()
    def whoever_moved_is_told_of(self) -> None:
        for key in self.moved:
            self.seen[key] = _slot(self.table.get(key))
        self.moved.clear()
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                key = ExpertKey(layer, expert)
                assert self.seen.get(key) == _slot(self.table.get(key))

    @invariant()
    def holds(self) -> None:
        self.table.check()
        for entry in self.locked:
            assert self.table.get(entry.key) is entry


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
