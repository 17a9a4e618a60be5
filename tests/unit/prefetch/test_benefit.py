"""Guessing goes on where it pays and stops where it does not."""

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from fate_moe.prefetch.benefit import BLOCK_STEPS, LONGEST_PAUSE, SHORTEST_PAUSE, Benefit

BEGINNING = {2: 4 * BLOCK_STEPS, 3: 6 * BLOCK_STEPS}
"""Steps in which every level is tried, by how many levels there are."""


def run(
    benefit: Benefit, cost: dict[int, float], steps: int, machine: Callable[[int], float] = float
) -> Counter[int]:
    """Let steps take what their level costs; count the levels.

    Args:
        machine: how much slower a step is than it might be, by its number.
    """
    seen: Counter[int] = Counter()
    for step in range(steps):
        seen[benefit.level] += 1
        slower = 1.0 if machine is float else machine(step)
        benefit.end_step(cost[benefit.level] * slower)
    return seen


@pytest.mark.parametrize("best", [0, 1, 2])
def test_most_steps_run_at_the_quickest_level(best: int) -> None:
    benefit = Benefit(3)
    seen = run(benefit, {level: 1.0 + 0.2 * (level != best) for level in range(3)}, 2000)
    assert seen[best] > 0.9 * 2000
    assert all(seen[level] > 0 for level in range(3))


def test_it_begins_by_guessing() -> None:
    benefit = Benefit(3)
    assert benefit.level == 2
    seen = run(benefit, {0: 1.0, 1: 1.0, 2: 1.0}, BEGINNING[3])
    assert seen == {0: 3 * BLOCK_STEPS, 1: BLOCK_STEPS, 2: 2 * BLOCK_STEPS}


def test_what_takes_as_long_is_not_worth_its_bytes() -> None:
    seen = run(Benefit(2), {0: 1.0, 1: 0.995}, 1000)
    assert seen[0] > 800


def test_it_changes_its_mind_when_guessing_pays_no_longer() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 2.0}, 300)
    run(benefit, {0: 2.0, 1: 1.0}, 600)
    assert run(benefit, {0: 2.0, 1: 1.0}, 300)[1] > 250


MACHINES: dict[str, Callable[[int], float]] = {
    "slower and slower": lambda step: 1.01**step,
    "faster and faster": lambda step: 0.99**step,
    "up and down": lambda step: 1.5 + math.sin(step / 15),
    "now slow, now fast": lambda step: 1.0 + (step // 60) % 2,
    "restless": lambda step: 1 + random.Random(step).random() / 5,
}


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_machine_that_changes_by_more_than_guessing_gains_misleads_nobody(
    machine: Callable[[int], float], best: int
) -> None:
    cost = {level: 1.0 + 0.08 * abs(level - best) for level in range(3)}
    seen = run(Benefit(3), cost, 600, machine)
    assert sum(cost[level] * count for level, count in seen.items()) < 1.03 * 600


def test_the_first_step_of_a_block_and_odd_ones_do_not_count() -> None:
    benefit = Benefit(2)
    for block in range(4):  # guessing, not guessing, guessing, not guessing
        for step in range(BLOCK_STEPS):
            slow = 100.0 if step in (0, 1) else 0.0
            benefit.end_step(slow + (1.0 if block % 2 else 2.0))
    assert list(benefit._found[1]) == pytest.approx([math.log(2)] * 2)
    assert benefit.level == 0
    seen = run(benefit, {0: 1.0, 1: 2.0}, LONGEST_PAUSE * BLOCK_STEPS)
    assert seen[1] > 0  # it is tried again


def pauses(benefit: Benefit, cost: dict[int, float], steps: int) -> list[int]:
    """Return how many blocks lie between trials of level 1."""
    tried = []
    for step in range(steps):
        if benefit.level == 1:
            tried.append(step)
        benefit.end_step(cost[benefit.level])
    return [(b - a - 1) // BLOCK_STEPS for a, b in pairwise(tried) if b - a > 1]


@pytest.mark.parametrize(
    ("longer", "pause"), [(1.02, SHORTEST_PAUSE), (1.1, 31), (1.3, 87), (9.0, LONGEST_PAUSE)]
)
def test_the_worse_a_level_the_less_often_it_is_tried(longer: float, pause: int) -> None:
    found = pauses(Benefit(2), {0: 1.0, 1: longer}, 3000)
    assert found[0] == 1
    assert set(found[1:]) == {pause}


@pytest.mark.parametrize("longer", [1.0, 1.02, 1.1, 1.5])
def test_trials_cost_little(longer: float) -> None:
    cost = {0: 1.0, 1: longer, 2: longer}
    benefit = Benefit(3)
    run(benefit, cost, BEGINNING[3])
    seen = run(benefit, cost, 4000)
    assert sum(cost[level] * count for level, count in seen.items()) < 1.01 * 4000


def test_more_guesses_are_not_tried_while_fewer_do_not_pay() -> None:
    benefit = Benefit(3)
    run(benefit, {0: 1.0, 1: 1.35, 2: 2.0}, BEGINNING[3])
    seen = run(benefit, {0: 1.0, 1: 1.35, 2: 2.0}, 4000)
    assert seen[1] > 0
    assert seen[2] == 0
    run(benefit, {0: 1.0, 1: 0.9, 2: 0.8}, 4000)
    assert run(benefit, {0: 1.0, 1: 0.9, 2: 0.8}, 400)[2] > 300


def test_without_a_predictor_there_is_nothing_to_choose() -> None:
    benefit = Benefit(1)
    assert run(benefit, {0: 1.0}, 100)[0] == 100
    assert benefit.describe() == "nothing is guessed"


def test_words_for_people() -> None:
    benefit = Benefit(2)
    assert benefit.describe() == "on; too few tokens to say whether it pays"
    run(benefit, {0: 0.03, 1: 0.02}, BEGINNING[2])
    assert benefit.describe() == "on; a token takes 20.0 ms with early guesses, 30.0 ms without"
    benefit = Benefit(3)
    run(benefit, {0: 0.01, 1: 0.02, 2: 0.04}, BEGINNING[3])
    assert benefit.describe() == (
        "off; a token takes 10.0 ms without, 20.0 ms with early guesses, "
        "40.0 ms with early and late guesses"
    )


def test_what_is_only_tried_is_called_that() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 1.2}, BEGINNING[2])
    for _ in range(LONGEST_PAUSE * BLOCK_STEPS):
        if benefit.level:
            break
        benefit.end_step(1.0)
    assert benefit.level == 1  # though it is the slower one
    times = "a token takes 1000.0 ms without, 1200.0 ms with early guesses"
    assert benefit.describe() == f"on, being tried; {times}"
    run(benefit, {1: 1.2}, BLOCK_STEPS)
    assert benefit.describe() == f"off; {times}"


def test_what_gains_too_little_is_called_that() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 0.995}, BEGINNING[2])
    assert benefit.level == 0
    assert benefit.describe() == (
        "off; a token takes 995.0 ms with early guesses, 1000.0 ms without: too close to be worth "
        "the bytes"
    )
