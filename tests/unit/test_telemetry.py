"""What the link's rate is made of."""

import pytest

from fate_moe.telemetry import LinkMeter


def test_the_rate_is_bytes_over_the_time_in_which_a_read_was_under_way() -> None:
    link = LinkMeter()
    assert link.bytes_per_s is None
    link.begin(0.0, 2)
    link.end(1.0, 10)
    link.end(2.0, 10)
    link.begin(5.0)  # three seconds in which nothing was asked for
    link.end(6.0, 10)
    assert link.bytes_per_s == pytest.approx(30 / 3)
    assert link.active == 0


def test_a_pause_before_an_end_was_told_is_no_work() -> None:
    link = LinkMeter()
    link.begin(0.0)
    link.begin(5.0)
    link.end(1.0, 10)  # told after five seconds
    link.end(6.0, 10)
    assert link.bytes_per_s == pytest.approx(20 / 2)


def test_a_long_read_beside_a_short_one() -> None:
    link = LinkMeter()
    link.begin(0.0)
    link.begin(5.0)
    link.end(6.0, 10)  # the short one: the long one was under way all along
    assert link.active == 1
    link.end(10.0, 10)
    assert link.bytes_per_s == pytest.approx(20 / 10)


def test_what_is_withdrawn_or_forgotten_brings_nothing() -> None:
    link = LinkMeter()
    link.begin(0.0, 3)
    link.end(1.0, 10)
    link.end(1.0, 0)
    link.forget()
    link.begin(9.0)
    link.end(9.5, 5)
    assert (link.active, link.bytes) == (0, 15)
    assert link.busy_s == pytest.approx(1.5)
