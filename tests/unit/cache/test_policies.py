"""Policies equal other people's implementations, or their definition written down plainly."""

from collections import deque
from functools import cache as memoized

import cachetools
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.cache import make_cache
from fate_moe.cache.belady import Belady
from fate_moe.cache.policy import EvictionPolicy, cache_bytes
from fate_moe.cache.transition import (
    BEFORE_LAST,
    FOLLOWING,
    IN_USE,
    KEPT,
    UNSURE,
    NumpyLayer,
    Transition,
)
from fate_moe.types import Choice, ExpertKey, Prediction

sequences = st.lists(st.integers(0, 11), max_size=200)


def hits_of(policy: EvictionPolicy, capacity: int, sequence: list[int]) -> list[bool]:
    """Drive a policy request by request; say which were hits."""
    resident: set[ExpertKey] = set()
    found = []
    for expert in sequence:
        key = ExpertKey(0, expert)
        found.append(key in resident)
        if key in resident:
            policy.hit(key)
            continue
        policy.miss(key)
        if len(resident) == capacity:
            victim = policy.victim(key, lambda _: True)
            assert victim is not None
            policy.evict(victim)
            resident.remove(victim)
        policy.admit(key)
        resident.add(key)
    return found


@given(sequence=sequences, capacity=st.integers(1, 8))
@pytest.mark.parametrize(
    ("name", "other"), [("lru", cachetools.LRUCache), ("lfu", cachetools.LFUCache)]
)
def test_equals_cachetools(
    name: str, other: type[cachetools.Cache], sequence: list[int], capacity: int
) -> None:
    theirs = other(capacity)
    expected = []
    for expert in sequence:
        expected.append(theirs.get(expert) is not None)
        if not expected[-1]:
            theirs[expert] = True
    assert hits_of(make_cache(name, capacity), capacity, sequence) == expected


class PlainS3FIFO:
    """Algorithm 1 of Yang et al. (SOSP 2023), written down separately."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.small_slots = capacity, max(1, int(0.1 * capacity))
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghosts: deque[int] = deque()
        self.freq: dict[int, int] = {}

    def ask(self, x: int) -> bool:
        if x in self.freq:
            self.freq[x] = min(3, self.freq[x] + 1)
            return True
        if len(self.freq) == self.capacity:
            self.evict()
        if x in self.ghosts:
            self.ghosts.remove(x)
            self.main.append(x)
        else:
            self.small.append(x)
        self.freq[x] = 0
        return False

    def evict(self) -> None:
        while len(self.small) >= self.small_slots:
            x = self.small.popleft()
            if self.freq[x] <= 1:
                del self.freq[x]
                self.ghosts.append(x)
                if len(self.ghosts) > max(1, self.capacity - self.small_slots):
                    self.ghosts.popleft()
                return
            self.freq[x] = 0
            self.main.append(x)
        while True:
            x = self.main.popleft()
            if self.freq[x] == 0:
                del self.freq[x]
                return
            self.freq[x] -= 1
            self.main.append(x)


many_keys = st.lists(st.integers(0, 9) | st.integers(10, 40), max_size=300)


@given(sequence=sequences | many_keys, capacity=st.sampled_from([1, 2, 3, 5, 8, 10]))
def test_s3fifo_equals_its_pseudo_code(sequence: list[int], capacity: int) -> None:
    plain = PlainS3FIFO(capacity)
    expected = [plain.ask(x) for x in sequence]
    assert hits_of(make_cache("s3fifo", capacity), capacity, sequence) == expected


def test_lfru_weighs_requests_by_their_age() -> None:
    policy = make_cache("lfru", 3)
    hits_of(policy, 3, [1, 1, 1, 1, 2, 2, 3])
    # At the eighth request: 4 requests, 4 requests ago; 2, 2 ago; 1, 1 ago: all worth 1.
    assert policy.victim(ExpertKey(0, 9), lambda _: True) == ExpertKey(0, 1)
    policy.hit(ExpertKey(0, 1))
    # At the ninth: 5 / 1, 2 / 3, 1 / 2.
    assert policy.victim(ExpertKey(0, 9), lambda _: True) == ExpertKey(0, 3)


def most_hits(sequence: tuple[int, ...], capacity: int) -> int:
    """Return what the best of all choices reaches, by trying all of them."""

    @memoized
    def best(place: int, resident: frozenset[int]) -> int:
        if place == len(sequence):
            return 0
        x = sequence[place]
        if x in resident:
            return 1 + best(place + 1, resident)
        if len(resident) < capacity:
            return best(place + 1, resident | {x})
        return max(best(place + 1, resident - {old} | {x}) for old in resident)

    return best(0, frozenset())


@given(sequence=st.lists(st.integers(0, 4), max_size=14).map(tuple), capacity=st.integers(1, 4))
def test_belady_is_the_best_there_is(sequence: tuple[int, ...], capacity: int) -> None:
    future: dict[ExpertKey, list[int]] = {}
    for when, expert in enumerate(sequence):
        future.setdefault(ExpertKey(0, expert), []).append(when)
    found = hits_of(Belady(capacity, future), capacity, list(sequence))
    assert sum(found) == most_hits(sequence, capacity)


def test_belady_passes_over_the_locked_and_admits_only_what_comes_sooner() -> None:
    a, b, c = (ExpertKey(0, expert) for expert in range(3))
    policy = Belady(2, {a: [0, 9], b: [1, 5], c: [2, 7]})
    for key in (a, b):
        policy.miss(key)
        policy.admit(key)
    policy.miss(c)
    assert policy.victim(c, lambda _: True) == a
    assert policy.victim(c, lambda key: key != a) == b
    assert policy.victim(c, lambda _: True) == a  # nothing was forgotten
    assert policy.admits(c, a)
    assert not policy.admits(c, b)


def test_guarded_spares_what_is_guessed() -> None:
    policy = make_cache("guarded", 2)
    hits_of(policy, 2, [1, 2])
    policy.expect(Prediction(0, (1,), 1))
    assert policy.victim(ExpertKey(0, 9), lambda _: True) == ExpertKey(0, 2)
    policy.expect(Prediction(0, (1, 2), 2))
    assert policy.victim(ExpertKey(0, 9), lambda _: True) == ExpertKey(0, 1)
    policy.expect(Prediction(1, (1, 2), 2))  # of another layer, and in place of the first
    assert policy.victim(ExpertKey(0, 9), lambda _: True) == ExpertKey(0, 1)


def worth_by_definition(steps: list[list[int]], experts: int) -> np.ndarray:
    """Return what `transition` should think of each expert after `steps` of one token."""
    mean = np.zeros(experts)
    after = np.zeros((experts, experts))
    seen = np.zeros(experts)
    for now, step in enumerate(steps):
        for back, weight in ((1, 1.0), (2, BEFORE_LAST)):
            for old in steps[now - back] if now >= back else []:
                seen[old] += weight
                after[old, step] += weight
        mean = KEPT * mean
        mean[step] += 1 - KEPT
    worth = mean
    for back, weight in ((1, 1.0), (2, BEFORE_LAST)):
        for old in steps[-back] if len(steps) >= back else []:
            worth += FOLLOWING * weight * after[old] / (seen[old] + UNSURE)
    worth[steps[-1]] += IN_USE
    return worth


steps_of_two = st.lists(
    st.lists(st.integers(0, 7), min_size=2, max_size=3, unique=True), min_size=1, max_size=30
)


@given(steps=steps_of_two)
def test_transition_weighs_as_it_says(steps: list[list[int]]) -> None:
    policy = Transition(8)
    for expert in range(8):
        policy.admit(ExpertKey(0, expert))
    for step in steps:
        policy.begin(Choice(0, step))
    worth = worth_by_definition(steps, 8)
    new, least = ExpertKey(0, 9), int(worth.argmin())
    victim = policy.victim(new, lambda _: True)
    assert victim is not None
    assert worth[victim.expert] == pytest.approx(worth[least], abs=1e-6)
    for old in range(8):
        for other in range(8):
            if abs(worth[old] - worth[other]) > 1e-6:
                admitted = policy.admits(ExpertKey(0, old), ExpertKey(0, other))
                assert admitted == (worth[old] > worth[other])


def test_transition_keeps_what_follows_where_recency_keeps_nothing() -> None:
    # Three pairs in turn, room for two of them: who was used longest ago comes next.
    steps = [[0, 1], [2, 3], [4, 5]] * 20

    def hits(name: str) -> int:
        policy = make_cache(name, 4)
        resident: set[ExpertKey] = set()
        count = 0
        for step in steps:
            policy.begin(Choice(0, step))
            for key in (ExpertKey(0, expert) for expert in step):
                if key in resident:
                    count += 1
                    policy.hit(key)
                    continue
                policy.miss(key)
                if len(resident) == 4:
                    victim = policy.victim(key, lambda _: True)
                    assert victim is not None
                    policy.evict(victim)
                    resident.remove(victim)
                policy.admit(key)
                resident.add(key)
        return count

    assert hits("lru") == 0
    assert hits("transition") >= 50  # of 120; the best is 59


def test_transition_learns_from_a_prompt_who_is_popular() -> None:
    policy = Transition(3)
    for expert in range(3):
        policy.admit(ExpertKey(0, expert))
    policy.begin(Choice(0, [0, 1, 2], 10, [9, 5, 2]))
    policy.begin(Choice(0, [5]))
    assert policy.victim(ExpertKey(0, 5), lambda _: True) == ExpertKey(0, 2)
    popular, rare = ExpertKey(0, 0), ExpertKey(0, 2)
    assert not policy.admits(rare, popular)


def test_transition_in_a_region_of_several_layers() -> None:
    policy = Transition(4)
    for layer, expert in ((0, 0), (0, 1), (1, 0), (1, 1)):
        policy.admit(ExpertKey(layer, expert))
    for _ in range(3):
        policy.begin(Choice(0, [0, 1]))
        policy.begin(Choice(1, [1]))
    assert policy.victim(ExpertKey(1, 7), lambda _: True) == ExpertKey(1, 0)
    policy.evict(ExpertKey(1, 0))
    free = policy.victim(ExpertKey(1, 7), lambda key: key.layer == 0)
    assert free in {ExpertKey(0, 0), ExpertKey(0, 1)}


def test_only_what_counts_pairs_takes_memory_that_matters() -> None:
    assert cache_bytes("transition", [128] * 48) >= 48 * 4 * 128 * 128
    assert cache_bytes("arc", [128] * 48) == 0
    layer = NumpyLayer()
    layer.step([127])
    assert layer._follows.nbytes <= Transition.layer_bytes(128)
