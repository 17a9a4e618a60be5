"""Guesses within the window, and beyond it those that are sure enough."""

import pytest

from fate_moe.prefetch.sureness import Sureness
from fate_moe.prefetch.wishes import Wishes
from fate_moe.types import Choice, ExpertKey, Prediction


def learn(sureness: Sureness, right: int, of: int, rank: int = 0) -> None:
    ranked = tuple(range(rank + 1))
    for number in range(of):
        asked = [rank] if number < right else [99]
        sureness.learn(Prediction(3, ranked, 1), Choice(3, asked), lambda key: key.expert == rank)


def wanted(wishes: Wishes) -> list[int]:
    found = []
    while (key := wishes.first()) is not None:
        found.append(key.expert)
        wishes.pop()
        wishes.spend()
    return found


def test_a_rank_is_as_sure_as_it_was_right() -> None:
    sureness = Sureness()
    assert sureness.chance(0) == 0.0
    learn(sureness, 300, 300)
    assert sureness.chance(0) == pytest.approx(1.0, abs=0.03)
    learn(sureness, 0, 300)
    assert sureness.chance(0) < 0.06
    learn(sureness, 5, 10, rank=4)
    assert 0.3 < sureness.chance(4) < 0.5  # of few guesses some count as wrong
    assert sureness.chance(3) == 0.0
    assert sureness.chance(77) == 0.0


def test_what_would_have_been_there_anyway_does_not_count() -> None:
    sureness = Sureness()
    for _ in range(50):
        sureness.learn(Prediction(0, (1, 2), 2), Choice(0, [1]), lambda key: key.expert == 2)
    assert (sureness.chance(0), sureness.chance(1)) == (0.0, 0.0)
    sureness.learn(Prediction(0, (1, 2), 2), Choice(0, [1]), lambda key: True)
    assert sureness.chance(0) > 0


def test_the_window_comes_first_and_sure_ones_beyond_it() -> None:
    wishes = Wishes()
    for rank, right in enumerate((90, 10, 90, 90, 20)):
        learn(wishes.sureness, right, 90, rank)
    guess = Prediction(1, (7, 8, 9, 5, 4), 3)
    wishes.open(2, 2.0)
    wishes.add(guess)
    assert wanted(wishes) == [7, 8]
    wishes.open(0, 0.7)
    wishes.add(guess)
    assert wanted(wishes) == [7, 9, 5]
    wishes.open(1, 0.7)
    wishes.add(guess)
    wishes.spend()
    wishes.give_back()
    assert wishes.first() == ExpertKey(1, 7)
    wishes.clear()
    assert wishes.first() is None
