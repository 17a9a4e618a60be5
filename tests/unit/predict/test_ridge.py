"""Fitted maps stand in for routers; where there are none, the paper's question does."""

import pytest
import torch

from fate_moe import native
from fate_moe.config import PredictConfig
from fate_moe.predict import Known, make_predictor
from fate_moe.predict.ridge import FittedRouter, Ridge
from tests.unit.predict.test_cross_layer import LinearRouter


def fitted(seed: int, *, is_normed: bool = False, top_k: int = 2) -> FittedRouter:
    draw = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(16, 8, generator=draw), torch.randn(16, generator=draw)
    return FittedRouter(weight, bias, top_k, is_normed)


def ridge(early: list[FittedRouter | None], late: list[FittedRouter | None]) -> Ridge:
    routers = [LinearRouter(16, 2, seed) for seed in (1, 2)]
    made = make_predictor(PredictConfig("ridge"), Known(routers, [16, 16], early, late))
    assert isinstance(made, Ridge)
    return made


def test_an_early_map_takes_the_routers_place() -> None:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(5))
    guess = ridge([None, fitted(9)], [None, None]).next(0, x)
    assert guess is not None
    scores = (fitted(9).weight @ x[0] + fitted(9).bias).topk(4).indices.tolist()
    assert (guess.layer, list(guess.ranked), guess.core) == (1, scores, 2)


def test_without_maps_it_is_the_papers() -> None:
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(5))
    paper = make_predictor(
        PredictConfig("cross_layer"),
        Known([LinearRouter(16, 2, seed) for seed in (1, 2)], [16] * 2),
    )
    for made in (ridge([], []), ridge([None, None], [None, None])):
        assert made.next(0, x) == paper.next(0, x)
        assert made.sharpen(1, x) is None
        assert not made.sharpens


def test_a_late_map_guesses_for_the_layer_itself_whatever_the_size_of_its_input() -> None:
    made = ridge([], [fitted(3, is_normed=True), None])
    assert made.sharpens
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(6))
    guess = made.sharpen(0, x)
    assert guess is not None
    assert guess.layer == 0
    assert guess == made.sharpen(0, 1000 * x)
    normed = x[0] / x[0].pow(2).mean().sqrt()
    want = (fitted(3).weight @ normed + fitted(3).bias).topk(4).indices.tolist()
    assert list(guess.ranked) == want
    assert made.sharpen(1, x) is None


@pytest.mark.skipif(not native.is_available(), reason=native.why_missing)
@pytest.mark.parametrize("is_normed", [False, True])
def test_natively_and_in_torch_the_same_experts_are_highest(is_normed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    one = FittedRouter(
        torch.randn(50, 67, generator=draw), torch.randn(50, generator=draw), 4, is_normed
    )
    assert one._native is not None
    for scale in (0.01, 1.0, 100.0):
        x = scale * torch.randn(1, 67, generator=draw)
        for count in (1, 9, 50):
            want = one.scores(x)[0].topk(count).indices.tolist()
            assert one.highest(x, count) == want
            assert one.highest(x.double(), count) == want  # in torch
    assert sorted(one.highest(torch.full((1, 67), float("nan")), 50)) == list(range(50))
    with pytest.raises(ValueError, match="count"):
        one.highest(torch.zeros(1, 67), 51)


def test_many_tokens_vote() -> None:
    made = ridge([], [fitted(3, is_normed=True), None])
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(7))
    guess = made.sharpen(0, x)
    assert guess is not None
    _, ids = fitted(3, is_normed=True)(x)
    votes = torch.bincount(ids.flatten(), minlength=16)
    assert set(guess.ranked) == set(votes.nonzero().flatten().tolist())


@pytest.mark.parametrize(("top_k", "width"), [(2, 4), (3, 5), (8, 12), (12, 16)])
def test_it_guesses_half_as_many_again_as_the_router_takes(top_k: int, width: int) -> None:
    made = ridge([], [fitted(3, top_k=top_k), None])
    assert made.width == width
    guess = made.sharpen(0, torch.randn(1, 8))
    assert guess is not None
    assert len(guess.ranked) == width
