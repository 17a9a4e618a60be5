"""Guessing goes on where it pays and stops where it does not."""

from collections import Counter
from itertools import pairwise

import pytest

from fate_moe.prefetch.benefit import FIRST_LONG_STEPS, LONG_STEPS, TRIAL_STEPS, Benefit


def run(benefit: Benefit, cost: dict[int, float], steps: int) -> Counter[int]:
    """Let steps take what their level costs; count the levels."""
    seen: Counter[int] = Counter()
    for _ in range(steps):
        seen[benefit.level] += 1
        benefit.end_step(cost[benefit.level])
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
    assert run(benefit, {0: 1.0, 1: 1.0, 2: 1.0}, TRIAL_STEPS)[2] == TRIAL_STEPS
    assert benefit.level == 1


def test_what_takes_as_long_is_not_worth_its_bytes() -> None:
    seen = run(Benefit(2), {0: 1.0, 1: 0.999}, 1000)
    assert seen[0] > 900


def test_it_changes_its_mind_when_the_machine_does() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 2.0}, 300)
    assert benefit.level == 0 or benefit._trials == []
    run(benefit, {0: 2.0, 1: 1.0}, 300)
    assert run(benefit, {0: 2.0, 1: 1.0}, 300)[1] > 250


def test_the_first_step_of_a_block_and_odd_ones_do_not_count() -> None:
    benefit = Benefit(2)
    for block in range(3):  # guessing, not guessing, guessing again
        for step in range(TRIAL_STEPS):
            slow = 100.0 if step in (0, 1) else 0.0
            benefit.end_step(slow + (1.0 if block == 1 else 2.0))
    assert benefit._seconds == [1.0, 2.0]
    assert benefit.level == 0
    run(benefit, {0: 1.0, 1: 2.0}, FIRST_LONG_STEPS)
    assert benefit.level == 1  # and is tried again


def test_it_tries_again_soon_at_first_and_then_less_often() -> None:
    benefit, tried = Benefit(2), []
    for step in range(1000):
        if benefit.level == 1:
            tried.append(step)
        benefit.end_step({0: 1.0, 1: 2.0}[benefit.level])
    pauses = [b - a - 1 for a, b in pairwise(tried) if b - a > 1]
    assert pauses[:4] == [TRIAL_STEPS, FIRST_LONG_STEPS, 2 * FIRST_LONG_STEPS, LONG_STEPS]
    assert set(pauses[3:]) == {LONG_STEPS}


def test_what_was_measured_last_counts_most() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 1.2}, 3 * TRIAL_STEPS + FIRST_LONG_STEPS)
    run(benefit, {0: 1.0, 1: 0.8}, TRIAL_STEPS)  # by now it has learned
    assert benefit.level == 1


def test_without_a_predictor_there_is_nothing_to_choose() -> None:
    benefit = Benefit(1)
    assert run(benefit, {0: 1.0}, 100)[0] == 100
    assert benefit.describe() == "nothing is guessed"


def test_words_for_people() -> None:
    benefit = Benefit(2)
    assert benefit.describe() == "on; too few tokens to say whether it pays"
    run(benefit, {0: 0.03, 1: 0.02}, 3 * TRIAL_STEPS)
    assert benefit.describe() == "on; a token takes 20.0 ms with early guesses, 30.0 ms without"
    benefit = Benefit(3)
    run(benefit, {0: 0.01, 1: 0.02, 2: 0.04}, 4 * TRIAL_STEPS)
    assert benefit.describe() == (
        "off; a token takes 10.0 ms without, 20.0 ms with early guesses, "
        "40.0 ms with early and late guesses"
    )


def test_what_is_only_tried_is_called_that() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 1.2}, 3 * TRIAL_STEPS + FIRST_LONG_STEPS)
    assert benefit.level == 1  # though it is the slower one: tried again
    times = "a token takes 1000.0 ms without, 1200.0 ms with early guesses"
    assert benefit.describe() == f"on, being tried; {times}"
    run(benefit, {1: 1.2}, TRIAL_STEPS)
    assert benefit.describe() == f"off; {times}"


def test_what_gains_too_little_is_called_that() -> None:
    benefit = Benefit(2)
    run(benefit, {0: 1.0, 1: 0.998}, 3 * TRIAL_STEPS)
    assert benefit.level == 0
    assert benefit.describe() == (
        "off; a token takes 998.0 ms with early guesses, 1000.0 ms without: too close to be worth "
        "the bytes"
    )
