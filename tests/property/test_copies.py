"""The copy engine's state machine: on a device whose copies are late, no byte is used wrongly."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fate_moe.memory.device import DeviceArena
from fate_moe.prefetch.copies import AHEAD_BYTES, CopyEngine
from fate_moe.store.reader import BackgroundReader, Request
from fate_moe.types import ExpertKey
from tests.links import FakeLink, FakeMark

SLOTS, RECORD = 4, 4096


class LateLink(FakeLink):
    """Kernels, too, run later than they are told to: they read their slot when their turn comes."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kernels: list[FakeMark] = []

    def compute(self, run: Callable[[], None]) -> None:
        before = self.kernels[-1:]
        self.kernels.append(FakeMark(run, list(before)))

    def now(self) -> FakeMark:
        return FakeMark(needs=self.kernels[-1:])


class Records:
    def part(self, key: ExpertKey, start: int, length: int | None) -> Tensor:
        end = RECORD if length is None else start + length
        return torch.full((end - start,), key.expert % 200, dtype=torch.uint8)

    def record_bytes(self, layer: int) -> int:
        return RECORD

    def close(self) -> None:
        """Nothing to give back."""


class Machine(RuleBasedStateMachine):
    """What the mover does, one slot at a time; a wrong byte is seen when a kernel runs."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.link = LateLink(seed)
        self.arena = DeviceArena(SLOTS, RECORD, self.link)
        self.engine = CopyEngine(Records(), self.arena, self.link, RECORD)
        assert isinstance(self.engine, BackgroundReader)
        self.slot_of: dict[ExpertKey, int] = {}
        self.here: set[ExpertKey] = set()
        self.wrong: list[str] = []
        self.next = 1

    @precondition(lambda self: len(self.slot_of) < SLOTS)
    @rule(urgent=st.booleans())
    def begin(self, urgent: bool) -> None:
        key = ExpertKey(0, self.next)
        self.next += 1
        free = set(range(SLOTS)) - set(self.slot_of.values())
        self.slot_of[key] = min(free)
        view = self.arena.view(self.slot_of[key])
        self.engine.start([Request(key, view[0:RECORD], 0, RECORD, urgent)])

    @rule()
    def look(self) -> None:
        for one in self.engine.landed():
            assert one.failure is None
            assert one.key in self.slot_of
            self.here.add(one.key)

    @rule()
    def wait(self) -> None:
        under_way = len(self.slot_of) > len(self.here)
        assert self.engine.wait(1.0) == under_way
        if under_way:
            before = len(self.here)
            self.look()
            assert len(self.here) > before

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def use(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.here)))
        slot = self.slot_of[key]

        def kernel() -> None:
            if not bool((self.arena.tensor(slot) == key.expert % 200).all()):
                self.wrong.append(f"{key} in slot {slot}")

        self.link.compute(kernel)
        self.arena.used([slot])

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.here)))
        self.here.remove(key)
        del self.slot_of[key]

    @precondition(lambda self: len(self.slot_of) > len(self.here))
    @rule(data=st.data())
    def withdraw(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(set(self.slot_of) - self.here)))
        if self.engine.withdraw(key):
            del self.slot_of[key]

    @rule()
    def forget(self) -> None:
        self.engine.forget()
        for key in set(self.slot_of) - self.here:
            del self.slot_of[key]
        assert not self.engine.landed()

    @rule()
    def compute_some(self) -> None:
        for mark in self.link.kernels[: len(self.link.kernels) // 2 + 1]:
            mark.pass_()

    @invariant()
    def no_byte_was_wrong(self) -> None:
        assert not getattr(self, "wrong", [])

    def teardown(self) -> None:
        if hasattr(self, "link"):
            for mark in self.link.kernels:
                mark.pass_()
            assert not self.wrong
            self.engine.close()


TestCopies = Machine.TestCase
TestCopies.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_a_router_asked_for_does_not_queue_behind_guesses() -> None:
    link = FakeLink(chance=0.0)
    arena = DeviceArena(8, AHEAD_BYTES, link)

    class Large(Records):
        def part(self, key: ExpertKey, start: int, length: int | None) -> Tensor:
            return torch.zeros(AHEAD_BYTES, dtype=torch.uint8)

        def record_bytes(self, layer: int) -> int:
            return AHEAD_BYTES

    engine = CopyEngine(Large(), arena, link)  # one guess at a time
    keys = [ExpertKey(0, e) for e in range(4)]
    guesses = [Request(key, arena.view(i), urgent=False) for i, key in enumerate(keys[:3])]
    engine.start(guesses)
    engine.start([Request(keys[3], arena.view(3))])
    assert (link.copies, link.urgent_copies) == (2, 1)  # the card has no more than it can chew
    assert not engine.withdraw(keys[0])
    assert engine.withdraw(keys[1])
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[3]]
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[0]]
    assert link.copies == 3  # the third guess follows the first
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[2]]
    engine.close()
