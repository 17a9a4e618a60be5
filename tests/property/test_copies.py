"""The copy engine's state machine: on a device whose copies are late, no byte is used wrongly."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fate_moe.memory.device import DeviceArena
from fate_moe.prefetch.copies import AHEAD_BYTES, CopyEngine
from fate_moe.store.reader import BackgroundReader, Request
from fate_moe.types import ExpertKey
from tests.cards import FakeCard, FakeMark

SLOTS, RECORD = 4, 4096


class LateCard(FakeCard):
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
        self.card = LateCard(seed)
        self.arena = DeviceArena(SLOTS, RECORD, self.card)
        self.engine = CopyEngine(Records(), self.arena, self.card, RECORD)
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

        self.card.compute(kernel)
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
        for mark in self.card.kernels[: len(self.card.kernels) // 2 + 1]:
            mark.pass_()

    @invariant()
    def no_byte_was_wrong(self) -> None:
        assert not getattr(self, "wrong", [])

    def teardown(self) -> None:
        if hasattr(self, "card"):
            for mark in self.card.kernels:
                mark.pass_()
            assert not self.wrong
            self.engine.close()


TestCopies = Machine.TestCase
TestCopies.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_a_router_asked_for_does_not_queue_behind_guesses() -> None:
    card = FakeCard(chance=0.0)
    arena = DeviceArena(8, AHEAD_BYTES, card)

    class Large(Records):
        def part(self, key: ExpertKey, start: int, length: int | None) -> Tensor:
            return torch.zeros(AHEAD_BYTES, dtype=torch.uint8)

        def record_bytes(self, layer: int) -> int:
            return AHEAD_BYTES

    engine = CopyEngine(Large(), arena, card)  # one guess at a time
    keys = [ExpertKey(0, e) for e in range(4)]
    guesses = [Request(key, arena.view(i), urgent=False) for i, key in enumerate(keys[:3])]
    engine.start(guesses)
    engine.start([Request(keys[3], arena.view(3))])
    assert (card.copies, card.urgent_copies) == (2, 1)  # the card has no more than it can chew
    assert not engine.withdraw(keys[0])
    assert engine.withdraw(keys[1])
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[3]]
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[0]]
    assert card.copies == 3  # the third guess follows the first
    assert engine.wait(1.0)
    assert [one.key for one in engine.landed()] == [keys[2]]
    engine.close()


class Plain:
    """An engine over small records; slot i holds what was asked for i-th."""

    def __init__(self, ahead_bytes: int = RECORD, chance: float = 0.0) -> None:
        self.card = FakeCard(chance=chance)
        self.arena = DeviceArena(64, RECORD, self.card)
        self.engine = CopyEngine(Records(), self.arena, self.card, ahead_bytes)

    def request(self, expert: int, urgent: bool = False) -> Request:
        return Request(ExpertKey(0, expert), self.arena.view(expert)[0:RECORD], 0, RECORD, urgent)

    def landed(self) -> list[int]:
        return [one.key.expert for one in self.engine.landed()]


def test_a_guess_that_is_wanted_goes_first() -> None:
    p = Plain()
    p.engine.start([p.request(expert) for expert in range(4)])
    assert p.card.copies == 1
    p.engine.promote(ExpertKey(0, 2))  # it had not begun
    assert (p.card.copies, p.card.urgent_copies) == (2, 1)
    assert p.engine.wait(1.0)
    assert p.landed() == [2]
    p.engine.promote(ExpertKey(0, 0))  # it has
    assert p.card.copies == 2  # demands may follow at once: guesses wait for them
    p.engine.start([p.request(9, urgent=True)])
    assert p.engine.wait(1.0)
    assert p.landed() == [0]  # the oldest that someone waits for
    p.engine.promote(ExpertKey(0, 77))  # nobody asked for it
    p.engine.close()


def test_an_interrupt_loses_no_copy() -> None:
    p = Plain()
    fill = p.arena.fill

    def interrupted(*args: Any) -> Any:
        fill(*args)
        raise KeyboardInterrupt

    p.arena.fill = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        p.engine.start([p.request(1, urgent=True)])
    p.arena.fill = fill  # type: ignore[method-assign]
    p.engine.forget()
    assert bool((p.arena.tensor(1) == 1).all())  # it is over: nothing writes there any more
    p.engine.close()


class SlowToAsk(FakeCard):
    """Takes a moment to be told; notes how many guesses it ever had at once."""

    def __init__(self) -> None:
        super().__init__(chance=0.5)
        self.marks: list[FakeMark] = []
        self.most = 0

    def copy(
        self, source: Tensor, target: Tensor, after: FakeMark | None, urgent: bool
    ) -> FakeMark:
        time.sleep(1e-4)
        mark = super().copy(source, target, after, urgent)
        self.marks = [one for one in self.marks if not one.done] + [mark]
        self.most = max(self.most, len(self.marks))
        return mark


def test_waiting_while_another_thread_begins_and_takes_in() -> None:
    p = Plain()
    card = SlowToAsk()
    p.arena = DeviceArena(64, RECORD, card)
    p.engine = CopyEngine(Records(), p.arena, card, RECORD)
    failures: list[BaseException] = []
    over = threading.Event()

    def wait() -> None:
        try:
            while not over.is_set():
                p.engine.wait(1.0)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        seen = 0
        for _ in range(60):
            p.engine.start([p.request(expert) for expert in range(6)])
            left = 6
            while left:
                landed = p.landed()
                seen += len(landed)
                left -= len(landed) + sum(p.engine.withdraw(ExpertKey(0, e)) for e in (2, 5))
    finally:
        over.set()
        waiting.join()
        sys.setswitchinterval(interval)
    assert not failures
    assert seen >= 60 * 4
    assert card.most == 1  # guess after guess, whoever began it
