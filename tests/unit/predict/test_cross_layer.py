"""The paper's predictor asks the next router, and never guesses nonsense."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fate_moe.config import PredictConfig
from fate_moe.errors import ConfigError
from fate_moe.predict import PREDICTORS, Known, Router, make_predictor
from fate_moe.predict.cross_layer import CrossLayer
from fate_moe.types import Prediction


class LinearRouter:
    def __init__(self, num_experts: int, top_k: int, seed: int, hidden: int = 8) -> None:
        self.num_experts, self._top_k = num_experts, top_k
        self.weight = torch.randn(
            num_experts, hidden, generator=torch.Generator().manual_seed(seed)
        )

    def __call__(self, gate_input: Tensor) -> tuple[Tensor, Tensor]:
        scores = gate_input @ self.weight.T
        return scores, scores.topk(self._top_k, dim=-1).indices


def predictor(routers: Sequence[Router | None], percentile: float = 75.0) -> CrossLayer:
    experts = [16 if router is None else router.num_experts for router in routers]
    return CrossLayer(Known(routers, experts), PredictConfig(percentile=percentile))


def test_one_token_gets_top_k_and_all_above_the_percentile() -> None:
    routers = [LinearRouter(16, 2, seed) for seed in (1, 2)]
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    guess = predictor(routers).next(0, x)
    assert guess is not None
    scores, ids = routers[1](x)
    assert guess.layer == 1
    assert guess.core == 2
    assert guess.ranked[:2] == tuple(ids[0].tolist())
    cut = torch.quantile(scores[0], 0.75)
    assert set(guess.ranked) == set(torch.where(scores[0] >= cut)[0].tolist())
    assert len(guess.ranked) == 4


@pytest.mark.parametrize(("num_experts", "width"), [(60, 15), (64, 16), (24, 6), (16, 4)])
def test_the_percentile_is_a_width(num_experts: int, width: int) -> None:
    # The paper's own figures: 15 experts for Qwen1.5-MoE, 16 for DeepSeek-MoE.
    assert predictor([LinearRouter(num_experts, 2, 1)]).width == width


def test_the_width_is_never_below_the_routers_own() -> None:
    guess = predictor([LinearRouter(16, 8, 1)] * 2).next(0, torch.randn(1, 8))
    assert guess is not None
    assert len(guess.ranked) == guess.core == 8


def test_many_tokens_get_the_union_most_popular_first() -> None:
    router = LinearRouter(16, 2, 2)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
    guess = predictor([None, router]).next(0, x)
    assert guess is not None
    votes = torch.bincount(router(x)[1].flatten(), minlength=16)
    assert set(guess.ranked) == set(torch.where(votes > 0)[0].tolist())
    counts = [int(votes[e]) for e in guess.ranked]
    assert counts == sorted(counts, reverse=True)
    assert guess.core == len(guess.ranked)


def test_the_last_layer_and_a_hidden_router_get_no_guess() -> None:
    routers = [LinearRouter(16, 2, 1), None]
    assert predictor(routers).next(0, torch.randn(1, 8)) is None
    assert predictor(routers).next(1, torch.randn(1, 8)) is None


@given(tokens=st.integers(1, 6), seed=st.integers(0, 100), percentile=st.floats(0, 100))
@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_guesses_are_distinct_experts_of_the_next_layer(
    name: str, tokens: int, seed: int, percentile: float
) -> None:
    routers = [LinearRouter(12, 3, seed), LinearRouter(12, 3, seed + 1)]
    config = PredictConfig(predictor=name, percentile=percentile)
    made = make_predictor(config, Known(routers, [12, 12]))
    made.learn(1, [seed % 12, (seed + 5) % 12])
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    guess = made.next(0, x)
    if guess is not None:
        assert len(set(guess.ranked)) == len(guess.ranked)
        assert all(0 <= e < 12 for e in guess.ranked)
        assert 0 < guess.core <= len(guess.ranked)
        assert guess.layer == 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'oracl' is none of cross_layer, history, none, path, ridge"
    ):
        make_predictor(PredictConfig(predictor="oracl"), Known())


def test_a_layer_that_cannot_be_asked_is_guessed_from_its_history() -> None:
    made = predictor([LinearRouter(16, 2, 1), None, LinearRouter(16, 2, 2)])
    x = torch.randn(1, 8)
    assert made.next(0, x) is None
    made.learn(1, [3, 9])
    assert made.next(0, x) == Prediction(1, (3, 9), 2)
    made.learn(2, [5, 6])  # this one is asked instead
    asked = made.next(1, x)
    assert asked is not None
    assert asked.ranked[:2] == tuple(LinearRouter(16, 2, 2)(x)[1][0].tolist())
