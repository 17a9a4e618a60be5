"""One thread at a time; whoever was interrupted inside is let in again and keeps nobody out."""

import threading

import pytest

from fate_moe.errors import CacheError
from fate_moe.models import turnstile
from fate_moe.models.turnstile import Turnstile


def enters(one: Turnstile, within_s: float = 5.0) -> bool:
    """Say whether another thread gets in, and out again."""
    inside = threading.Event()

    def go() -> None:
        one.enter()
        inside.set()
        one.leave()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return inside.wait(within_s)


def test_others_wait_until_one_has_left() -> None:
    one = Turnstile()
    one.enter()
    inside = threading.Event()

    def go() -> None:
        one.enter()
        inside.set()
        one.leave()

    thread = threading.Thread(target=go)
    thread.start()
    assert not inside.wait(0.1)
    one.leave()
    assert inside.wait(5)
    thread.join()


def test_whoever_never_left_leaves_for_good_the_next_time() -> None:
    one = Turnstile()
    one.enter()  # and an interrupt before it could leave
    one.enter()
    one.leave()
    assert enters(one)


def test_leaving_lets_nobody_else_out() -> None:
    one = Turnstile()
    one.leave()
    one.enter()
    thread = threading.Thread(target=one.leave)
    thread.start()
    thread.join()
    assert not enters(one, 0.1)
    one.leave()


def test_waiting_for_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "PATIENCE_S", 0.05)
    one, failures = Turnstile(), []

    def go() -> None:
        try:
            one.enter()
        except CacheError as error:
            failures.append(str(error))

    one.enter()
    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    one.leave()
    assert failures == ["another thread has been computing for over 0 s"]
