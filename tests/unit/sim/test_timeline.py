"""Times of a small replay, as a person would work them out; counts as without a clock."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fate_moe.cache import make_cache
from fate_moe.cache.allocation import Regions
from fate_moe.sim.guesses import make_guesser
from fate_moe.sim.replay import replay
from fate_moe.sim.timeline import Link, Timed, time_decode
from fate_moe.sim.trace import Step, Trace, read_trace
from fate_moe.types import Choice, Phase, Prediction
from tests.unit.sim.test_replay import trace_file  # noqa: F401 - a fixture

MB = 10**6


def run(
    steps: list[Step],
    link: Link,
    *,
    capacities: tuple[int, ...],
    size: int = MB,
    predictor: str = "none",
    spare: int = 8,
) -> Timed:
    trace = Trace("t", (8,) * len(capacities), 2, steps, (size,) * len(capacities), "cross_layer")
    return time_decode(
        trace, Regions.per_layer(capacities), partial(make_cache, "lru"),
        make_guesser(predictor, trace), trace.record_bytes or (), link, spare_slots=spare,
    )  # fmt: skip


def test_a_large_record_comes_while_the_others_are_computed() -> None:
    steps = [Step([Choice(0, [expert])]) for expert in (0, 1, 0)]
    timed = run(steps, Link(MB, token_s=0.5), capacities=(1,))
    # Each: read for 1 s, then half of the layer's computing is left.
    assert timed.seconds == pytest.approx(3 * 1.25)
    assert timed.stall_s == pytest.approx(3 * 0.75)
    assert timed.tok_s == pytest.approx(3 / 3.75)
    assert timed.found.total().misses == 3


def test_every_read_pays_the_latency() -> None:
    steps = [Step([Choice(0, [0, 1])]), Step([Choice(0, [1, 2])])]
    timed = run(steps, Link(MB, token_s=0.6, latency_s=0.1), capacities=(4,), size=700_000)
    # Two reads of 0.8 s, then one; of three parts of computing the last follows them.
    assert timed.seconds == pytest.approx((2 * 0.8 + 0.2) + (0.8 + 0.2))


def test_what_is_resident_takes_no_more_than_computing() -> None:
    steps = [Step([Choice(0, [0, 1])])] * 3
    timed = run(steps, Link(MB, token_s=0.5), capacities=(8,))
    assert timed.seconds == pytest.approx(1.5)
    assert timed.stall_s == 0
    assert timed.found.total().hit_rate == 1


def guessed(*ranked: int) -> list[Prediction | None]:
    return [None, Prediction(1, ranked, 1)]


def test_a_guess_that_has_landed_is_a_hit_and_one_on_its_way_is_late() -> None:
    link = Link(4 * MB, token_s=0.5)  # a read and a layer take 0.25 s each
    good = run(
        [Step([Choice(0, [0]), Choice(1, [5])], guessed(5))],
        link, capacities=(8, 1), predictor="cross_layer",
    )  # fmt: skip
    counts = good.found.counts[Phase.DECODE][1]
    assert (counts.hits, counts.late, counts.misses, counts.saved) == (1, 0, 0, 1)
    assert good.seconds == pytest.approx(0.5)
    # Layer 0 misses: its read takes the link to 0.25, the layer ends at 0.375, the guess at 0.5.
    late = run(
        [Step([Choice(0, [0]), Choice(1, [5])], guessed(5))],
        link, capacities=(1, 1), predictor="cross_layer",
    )  # fmt: skip
    counts = late.found.counts[Phase.DECODE][1]
    assert (counts.hits, counts.late, counts.misses) == (0, 1, 0)
    assert late.seconds == pytest.approx(0.375 + 0.25)
    assert late.found.bytes_demand == MB
    assert (late.found.bytes_speculated, late.found.bytes_wasted) == (MB, 0)


def test_a_guess_that_has_not_begun_is_dropped_or_becomes_a_demand() -> None:
    link = Link(8 * MB, token_s=0.5)  # two reads a layer: 0 to 0.125 s, 0.125 to 0.25 s
    steps = [Step([Choice(0, [0, 1, 2]), Choice(1, [6])], guessed(5, 6))]
    timed = run(steps, link, capacities=(1, 1), predictor="cross_layer")
    # Layer 0's three reads end at 0.375, the layer at 0.4375; guess 5 is on its way, 6 waits.
    counts = timed.found.counts[Phase.DECODE][1]
    assert (counts.hits, counts.late, counts.misses) == (0, 1, 0)
    # 5 ends at 0.5, then 6 at 0.625, and half of the layer's computing is left.
    assert timed.seconds == pytest.approx(0.4375 + 0.3125)
    assert (timed.found.guesses, timed.found.guesses_used) == (2, 1)
    assert timed.found.bytes_wasted == MB
    steps = [Step([Choice(0, [0, 1, 2]), Choice(1, [7])], guessed(5, 6))]
    timed = run(steps, link, capacities=(1, 1), predictor="cross_layer")
    assert (timed.found.guesses, timed.found.bytes_speculated) == (1, MB)


def test_sure_guesses_go_beyond_the_window_and_others_do_not() -> None:
    found = {}
    for right in (True, False):
        steps = []
        for number in range(40):
            asked = number % 8
            named = asked if right else (asked + 4) % 8
            steps.append(Step([Choice(0, [0]), Choice(1, [asked])], guessed(named)))
        # A read takes 1 s, a layer 0.5 s: the window has room for none.
        timed = run(
            steps, Link(MB, token_s=1.0), capacities=(8, 1), predictor="cross_layer"
        )  # fmt: skip
        found[right] = timed.found.guesses
        if right:
            assert timed.found.guesses_used == timed.found.guesses > 30
    assert found[False] == 0


def test_guesses_keep_to_the_window_and_the_spare_slots() -> None:
    steps = [Step([Choice(0, [0]), Choice(1, [7])], guessed(1, 2, 3, 4, 5, 6))]
    fast = Link(400 * MB, token_s=0.5)
    timed = run(steps, fast, capacities=(8, 1), predictor="cross_layer", spare=4)
    assert timed.found.guesses == 4
    timed = run(steps, Link(12 * MB, token_s=0.5), capacities=(8, 1), predictor="cross_layer")
    assert timed.found.guesses == 3  # as many as a layer's computing hides


def test_guessing_takes_time_of_its_own() -> None:
    steps = [Step([Choice(0, [0]), Choice(1, [0])], guessed(0))]
    timed = run(
        steps, Link(MB, token_s=0.5, guess_s=0.2), capacities=(8, 8), predictor="cross_layer"
    )
    assert timed.seconds == pytest.approx(0.5 + 0.1)  # one of two layers is guessed


def test_each_read_takes_from_computing_also_where_nothing_waits() -> None:
    steps = [Step([Choice(0, [0, 1])]), Step([Choice(0, [1, 2])]), Step([Choice(0, [1, 2])])]
    fast = Link(1000 * MB, token_s=0.6, read_s=0.1)
    timed = run(steps, fast, capacities=(4,))
    assert timed.seconds == pytest.approx(3 * 0.6 + 3 * 0.1)  # two reads, one, none
    assert timed.stall_s == pytest.approx(0)
    # On a slow link it hides behind no waiting.
    timed = run(steps[:1], Link(MB, token_s=0.6, read_s=0.1), capacities=(4,))
    assert timed.seconds == pytest.approx(2.0 + 0.2 + 2 * 0.1)
    assert timed.stall_s == pytest.approx(2.2 - 0.6)


def test_a_layer_that_is_not_passed_takes_longer() -> None:
    steps = [Step([Choice(0, [0, 1]), Choice(1, [expert])]) for expert in (5, 6)]
    link = Link(1000 * MB, token_s=0.6, stop_s=0.1)
    timed = run(steps, link, capacities=(4, 1))
    assert timed.stops == 3  # layer 0 is passed the second time
    assert timed.seconds == pytest.approx(2 * 0.6 + 3 * 0.1)
    # All are resident, but guessed for.
    steps = [Step([Choice(0, [0]), Choice(1, [5])], guessed(5))] * 2
    timed = run(steps, link, capacities=(8, 8), predictor="cross_layer")
    assert timed.stops == 4
    assert timed.seconds == pytest.approx(2 * 0.6 + 4 * 0.1)
    # The stop comes before the reads are asked for.
    timed = run(steps[:1], replace(link, bytes_s=MB), capacities=(4, 1))
    assert timed.seconds == pytest.approx(2 * (0.1 + 1.0 + 0.15))


def test_a_guessed_read_takes_from_computing_where_it_begins() -> None:
    steps = [Step([Choice(0, [0]), Choice(1, [7])], guessed(1, 2, 3, 7))]
    # 50 reads a second; 0.25 s of computing, and 0.1 for each read: all four begin.
    link = Link(50 * MB, token_s=0.5, read_s=0.1)
    timed = run(steps, link, capacities=(8, 1), predictor="cross_layer")
    assert timed.found.guesses == 4
    assert timed.seconds == pytest.approx(2 * 0.25 + 4 * 0.1)
    # Two guesses fit into the window; the miss of layer 1 is the third read.
    timed = run(
        steps, Link(8 * MB, token_s=0.5, read_s=1e-3), capacities=(8, 1), predictor="cross_layer"
    )
    assert timed.found.guesses == 2
    assert timed.seconds == pytest.approx(0.5 + 3e-3)


def test_only_experts_are_computed_while_a_layers_own_reads_come_in() -> None:
    steps = [Step([Choice(0, [0, 1])])]
    whole = run(steps, Link(4 * MB, token_s=0.9), capacities=(4,))
    assert whole.seconds == pytest.approx(0.9)  # two reads of 0.25 s, then a third: 0.8 < 0.9
    assert whole.stall_s == 0
    part = run(steps, Link(4 * MB, token_s=0.9, experts_s=0.3), capacities=(4,))
    assert part.seconds == pytest.approx(0.5 + 0.1 + 0.6)
    assert part.stall_s == pytest.approx(0.3)
    # What comes after the experts still hides guesses for the next layer.
    steps = [Step([Choice(0, [0]), Choice(1, [5])], guessed(5))]
    link = Link(4 * MB, token_s=0.6, experts_s=0.0)
    timed = run(steps, link, capacities=(8, 1), predictor="cross_layer")
    assert (timed.seconds, timed.found.counts[Phase.DECODE][1].hits) == (pytest.approx(0.6), 1)


def test_prompts_fill_the_cache_and_take_no_time() -> None:
    steps = [Step([Choice(0, [3, 4], 5, [4, 2])]), Step([Choice(0, [3, 4])])]
    timed = run(steps, Link(MB, token_s=0.5), capacities=(2,))
    assert (timed.steps, timed.seconds) == (1, 0.5)
    assert timed.found.total().requests == 2


@pytest.mark.parametrize("cache", ["lru", "transition"])
def test_without_guesses_the_counts_are_those_without_a_clock(
    trace_file: Path,  # noqa: F811
    cache: str,
) -> None:
    trace = read_trace(trace_file)
    regions, maker = Regions.per_layer([5] * 3), partial(make_cache, cache)
    nothing, sizes = make_guesser("none", trace), [MB] * 3
    timed = time_decode(trace, regions, maker, nothing, sizes, Link(MB, token_s=0.1), spare_slots=2)
    plain = replay(trace, regions, maker, nothing, sizes, leases=True, spare_slots=2)
    assert timed.found.total() == plain.total()
    assert timed.found.evictions == plain.evictions
    assert timed.found.bytes_demand == plain.bytes_demand
