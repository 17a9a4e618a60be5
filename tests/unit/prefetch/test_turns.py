"""How many guesses does computing hide, and how sure must one beyond them be?"""

import time

import pytest

from fate_moe.prefetch.benefit import Benefit
from fate_moe.prefetch.turns import Turns
from fate_moe.telemetry import LinkMeter, Telemetry
from fate_moe.types import Phase


def turns(window: int | None, compute_s: float | None, rate: float | None) -> Turns:
    link = LinkMeter()
    if rate is not None:
        link.begin(0.0)
        link.end(1.0, int(rate))
    made = Turns(window, link, Telemetry(4), Benefit(2))
    made.begin(0, Phase.DECODE)
    if compute_s is not None:
        made.compute_s[Phase.DECODE].add(compute_s)
    return made


@pytest.mark.parametrize(
    ("compute_s", "window", "chance"),
    [(0.004, 0, 0.01 / 0.014), (0.01, 1, 0.5), (0.035, 3, 0.5), (0.0, 0, 1.0)],
)
def test_what_is_hidden_and_what_a_wrong_one_costs(
    compute_s: float, window: int, chance: float
) -> None:
    made = turns(None, compute_s, 1e6)  # 10 ms for each read
    assert made.window(10_000, 9) == window
    assert made.least_chance(10_000) == pytest.approx(chance)


def test_a_window_that_was_asked_for_is_kept() -> None:
    made = turns(5, 0.01, 1e6)
    assert made.window(10_000, 9) == 5
    assert made.least_chance(10_000) > 1


@pytest.mark.parametrize(("compute_s", "rate"), [(None, 1e6), (0.01, None)])
def test_before_anything_is_known_the_spare_slots_are_the_window(
    compute_s: float | None, rate: float | None
) -> None:
    made = turns(None, compute_s, rate)
    assert made.window(10_000, 9) == 9
    assert made.least_chance(10_000) > 1


def test_counts_that_were_set_to_zero_meanwhile_are_no_negative_wait() -> None:
    telemetry = Telemetry(4)
    telemetry.stall_s = 5.0
    made = Turns(None, LinkMeter(), telemetry, Benefit(1))
    made.begin(0, Phase.DECODE)
    telemetry.reset()
    made.end_lease()
    assert telemetry.leases[Phase.DECODE].stall_s == 0.0


def test_a_lease_books_its_time_and_what_it_waited_by_phase() -> None:
    telemetry = Telemetry(4)
    made = Turns(None, LinkMeter(), telemetry, Benefit(1))
    made.end_lease()  # none was open
    for phase, waited_s in ((Phase.DECODE, 0.25), (Phase.PREFILL, 0.5), (Phase.DECODE, 0.125)):
        made.begin(0, phase)
        telemetry.stall_s += waited_s
        time.sleep(0.01)
        made.end_lease()
    found = telemetry.leases
    assert (found[Phase.DECODE].stall_s, found[Phase.PREFILL].stall_s) == (0.375, 0.5)
    assert found[Phase.DECODE].lease_s >= 0.02
    assert found[Phase.PREFILL].lease_s >= 0.01
    made.begin(1, Phase.DECODE)
    telemetry.reset()
    assert telemetry.leases[Phase.DECODE].lease_s == 0


def test_a_chunk_of_a_prompt_is_measured_by_itself() -> None:
    made = turns(None, None, 1e6)
    made.begin(0, Phase.PREFILL)
    made.compute_s[Phase.PREFILL].add(0.05)
    made.begin(1, Phase.PREFILL)
    assert made.window(10_000, 9) > 0
    known = made.compute_s[Phase.PREFILL].value
    assert known is not None
    made.begin(0, Phase.PREFILL)
    assert made.compute_s[Phase.PREFILL].value is None
    assert made.window(10_000, 9) == 9
