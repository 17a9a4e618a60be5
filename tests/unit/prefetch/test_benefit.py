"""Guessing goes on where it pays and stops where it does not."""

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from fate_moe.prefetch.benefit import BLOCK_STEPS, FIRST_PAUSE, LONGEST_PAUSE, Benefit

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
    assert seen[0] > 900


def test_it_changes_its_mind_when_guessing_pays_no_longer() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 2.0}, 300)
    run(benefit, {0: 2.0, 1: 1.0}, 500)
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
    assert seen[best] > 0.8 * 600


def test_the_first_step_of_a_block_and_odd_ones_do_not_count() -> None:
    benefit = Benefit(2)
    for block in range(4):  # guessing, not guessing, guessing, not guessing
        for step in range(BLOCK_STEPS):
            slow = 100.0 if step in (0, 1) else 0.0
            benefit.end_step(slow + (1.0 if block % 2 else 2.0))
    assert list(benefit._found[1]) == pytest.approx([math.log(2)] * 2)
    assert benefit.level == 0
    run(benefit, {0: 1.0, 1: 2.0}, FIRST_PAUSE * BLOCK_STEPS)
    assert benefit.level == 1  # and is tried again


def test_it_tries_again_soon_at_first_and_then_less_often() -> None:
    benefit, tried = Benefit(2), []
    for step in range(1000):
        if benefit.level == 1:
            tried.append(step)
        benefit.end_step({0: 1.0, 1: 2.0}[benefit.level])
    pauses = [(b - a - 1) // BLOCK_STEPS for a, b in pairwise(tried) if b - a > 1]
    # A block follows each trial, to compare it with.
    assert pauses[:4] == [1, 1 + FIRST_PAUSE, 1 + 2 * FIRST_PAUSE, 1 + LONGEST_PAUSE]
    assert set(pauses[3:]) == {1 + LONGEST_PAUSE}


def test_after_a_surprise_it_tries_again_soon() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 2.0}, 400)
    assert benefit._pause == LONGEST_PAUSE
    steps = 0
    while not benefit.level or benefit._quickest() != 1:
        benefit.end_step({0: 1.0, 1: 0.5}[benefit.level])
        steps += 1
        assert steps < 400
    assert benefit._pause <= 2 * FIRST_PAUSE


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
    run(benefit, {0: 1.0, 1: 1.2}, BEGINNING[2] + FIRST_PAUSE * BLOCK_STEPS)
    assert benefit.level == 1  # though it is the slower one: tried again
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
