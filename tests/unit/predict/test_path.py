"""The activation path: what the most similar earlier request took."""

import pytest
import torch

from fate_moe.config import PredictConfig
from fate_moe.predict import Known
from fate_moe.predict.path import KEPT, Path

PROMPT, TOKEN = torch.zeros(4, 1), torch.zeros(1, 1)


def path(layers: int = 3, experts: int = 8) -> Path:
    return Path(Known([None] * layers, [experts] * layers), PredictConfig())


def run(made: Path, paths: list[list[int]], steps: int = 4) -> list[tuple[int, ...]]:
    """Run a request, a prompt and some tokens, each taking the same experts; return its guesses."""
    guesses: list[tuple[int, ...]] = []
    for x in (PROMPT, *[TOKEN] * steps):
        for layer, experts in enumerate(paths):
            guess = made.next(layer, x)
            if guess is not None:
                assert guess.layer == layer + 1
                guesses.append(guess.ranked)
            made.learn(layer, experts)
    return guesses


def test_the_most_similar_earlier_request_is_followed() -> None:
    made = path()
    cats, dogs = [[0, 1], [2, 3], [4, 5]], [[6, 7], [2, 6], [0, 7]]
    run(made, cats)
    run(made, dogs)
    run(made, cats)  # ends the second
    for x in (PROMPT, TOKEN):
        assert made.next(0, x) is not None
        made.learn(0, [6, 7])  # begins like the second, which took 2 and 6 next
        guess = made.next(1, x)
        assert guess is not None
        assert set(guess.ranked) == {0, 7}
        made.learn(1, [2, 6])
        assert made.next(2, x) is None
        made.learn(2, [0, 7])


def test_without_an_earlier_one_its_own_past_is() -> None:
    made = path()
    assert made.next(0, PROMPT) is None
    made.learn(0, [1])
    made.learn(1, [3, 5])
    guess = made.next(0, TOKEN)
    assert guess is not None
    assert set(guess.ranked) == {3, 5}


@pytest.mark.parametrize(("experts", "width"), [(60, 15), (24, 6)])
def test_it_is_as_wide_as_the_papers(experts: int, width: int) -> None:
    assert path(experts=experts).width == width


def test_only_the_last_requests_are_kept() -> None:
    made = path(layers=2)
    for _ in range(KEPT + 3):
        run(made, [[0], [1]], steps=1)
    assert len(made._earlier) == KEPT
