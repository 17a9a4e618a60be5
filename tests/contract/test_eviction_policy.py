"""Every eviction policy obeys the same laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.cache import CACHES, make_cache
from fate_moe.cache.policy import EvictionPolicy
from fate_moe.errors import ConfigError
from fate_moe.types import Choice, ExpertKey, Prediction

requests = st.lists(st.integers(0, 9), max_size=120)


def run(policy: EvictionPolicy, capacity: int, sequence: list[int]) -> tuple[set[int], int]:
    """Drive a policy as the table does; return the residents and the hits."""
    resident: set[int] = set()
    hits = 0
    for expert in sequence:
        key = ExpertKey(0, expert)
        if expert in resident:
            hits += 1
            policy.hit(key)
            continue
        policy.miss(key)
        if len(resident) == capacity:
            victim = policy.victim(key, lambda _: True)
            assert victim is not None
            assert victim.expert in resident
            policy.evict(victim)
            resident.remove(victim.expert)
        policy.admit(key)
        resident.add(expert)
        assert len(resident) <= capacity
    return resident, hits


@given(sequence=requests, capacity=st.integers(1, 10))
@pytest.mark.parametrize("name", sorted(CACHES))
def test_evicts_only_residents_and_only_when_full(
    name: str, sequence: list[int], capacity: int
) -> None:
    resident, _ = run(make_cache(name, capacity), capacity, sequence)
    assert resident <= set(sequence)
    assert len(resident) == min(capacity, len(set(sequence)))


@given(sequence=requests)
@pytest.mark.parametrize("name", sorted(CACHES))
def test_a_cache_that_holds_everything_misses_each_key_once(name: str, sequence: list[int]) -> None:
    _, hits = run(make_cache(name, 10), 10, sequence)
    assert hits == len(sequence) - len(set(sequence))


@pytest.mark.parametrize("name", sorted(CACHES))
def test_choosing_a_victim_changes_nothing(name: str) -> None:
    policy = make_cache(name, 3)
    for expert in (1, 2, 3):
        _admit(policy, ExpertKey(0, expert))
    policy.hit(ExpertKey(0, 1))
    new = ExpertKey(0, 9)
    assert policy.victim(new, lambda _: True) == policy.victim(new, lambda _: True)


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 1), st.lists(st.integers(0, 9), max_size=5, unique=True),
            st.integers(1, 3),
        ),
        max_size=40,
    ),
    capacity=st.integers(1, 10),
)  # fmt: skip
@pytest.mark.parametrize("name", sorted(CACHES))
def test_whole_steps_of_several_layers_and_guesses_for_them(
    name: str, steps: list[tuple[int, list[int], int]], capacity: int
) -> None:
    policy = make_cache(name, capacity)
    resident: set[ExpertKey] = set()
    for layer, experts, tokens in steps:
        policy.expect(Prediction(layer, tuple(experts[:2]), 1))
        counts = None if tokens == 1 else [1] * len(experts)
        policy.begin(Choice(layer, experts, tokens, counts))
        asked = {ExpertKey(layer, expert) for expert in experts}
        for key in asked:
            if key in resident:
                policy.hit(key)
                continue
            policy.miss(key)
            if len(resident) == capacity:
                victim = policy.victim(key, lambda old, asked=asked: old not in asked)
                if victim is None or not policy.admits(key, victim):
                    continue
                assert victim in resident - asked
                policy.evict(victim)
                resident.remove(victim)
            policy.admit(key)
            resident.add(key)


def _admit(policy: EvictionPolicy, key: ExpertKey) -> None:
    policy.miss(key)
    policy.admit(key)


@pytest.mark.parametrize("name", sorted(CACHES))
def test_a_locked_expert_is_never_the_victim(name: str) -> None:
    policy = make_cache(name, 3)
    for expert in (1, 2, 3):
        _admit(policy, ExpertKey(0, expert))
    new = ExpertKey(0, 9)
    for free in (1, 2, 3):
        assert policy.victim(new, lambda k, free=free: k.expert == free) == ExpertKey(0, free)
    assert policy.victim(new, lambda _: False) is None


@pytest.mark.parametrize("name", sorted(CACHES))
def test_a_forgotten_expert_is_gone(name: str) -> None:
    policy = make_cache(name, 2)
    _admit(policy, ExpertKey(0, 1))
    policy.forget(ExpertKey(0, 1))
    assert policy.victim(ExpertKey(0, 9), lambda _: True) is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'lfuu' is none of arc, guarded, lfru, .*lru"):
        make_cache("lfuu", 3)
