"""What a layer took lately is what it is guessed to take."""

import torch

from fate_moe.config import PredictConfig
from fate_moe.predict import Known
from fate_moe.predict.history import History
from fate_moe.types import Prediction

ONE, MANY = torch.zeros(1, 4), torch.zeros(7, 4)


def history(experts: int = 16) -> History:
    return History(Known([None, None], [experts, experts]), PredictConfig())


def test_without_a_past_and_behind_the_last_layer_nothing_is_guessed() -> None:
    made = history()
    assert made.next(0, ONE) is None
    made.learn(0, [1])
    assert made.next(0, ONE) is None
    made.learn(1, [1])
    assert made.next(0, ONE) is not None
    assert made.next(1, ONE) is None


def test_the_newest_and_the_most_frequent_come_first() -> None:
    made = history()
    for chosen in ([2, 7], [2, 4], [2, 9]):
        made.learn(1, chosen)
    assert made.next(0, ONE) == Prediction(1, (2, 9, 4, 7), 2)  # 4 = the width of 16 experts
    for _ in range(3):
        made.learn(1, [11, 12])
    guess = made.next(0, ONE)
    assert guess is not None
    assert guess.ranked[:2] == (11, 12)


def test_a_step_of_many_tokens_is_guessed_as_wide_as_the_last_one_and_a_token_is_not() -> None:
    made = history()
    made.learn(1, [5, 6])
    made.learn(1, list(range(10)))
    guess = made.next(0, MANY)
    assert guess is not None
    assert guess.ranked[:2] == (5, 6)
    assert len(guess.ranked) == guess.core == 10
    single = made.next(0, ONE)
    assert single is not None
    assert (len(single.ranked), single.core) == (4, 2)


def test_a_token_takes_at_least_its_own_number() -> None:
    made = history(experts=8)  # width 2
    made.learn(1, [1, 2, 3, 4])
    assert made.next(0, ONE) == Prediction(1, (1, 2, 3, 4), 4)


def test_a_step_that_chose_no_expert_teaches_nothing() -> None:
    made = history()
    made.learn(1, [1, 2])
    before = made.next(0, ONE)
    made.learn(1, [])
    assert made.next(0, ONE) == before
