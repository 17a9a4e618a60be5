"""Are experts that are there preferred by as much as was asked for, and weighted as ever?"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fate_moe.errors import ConfigError
from fate_moe.models.routing_bias import RoutingBias, routing_biases
from fate_moe.models.seam import AskableRouter, MoESite

EXPERTS, K, HIDDEN = 6, 2, 8
LOGITS = torch.tensor([[3.0, 2.0, 1.5, 1.0, 0.5, 0.0]])


class FakeThere:
    """Experts of a set are there."""

    def __init__(self, *experts: int) -> None:
        self.num_experts = EXPERTS
        self.count = 0
        self._there = experts

    def among(self, experts: Iterable[int]) -> list[int]:
        return [e for e in experts if e in self._there]

    def rerouted(self, count: int) -> None:
        self.count += count


def routed(logits: Tensor, is_normed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = logits.softmax(1).topk(K)
    return logits, weights / weights.sum(1, keepdim=True) if is_normed else weights, ids


def rerouted(bias: float, *there: int, logits: Tensor = LOGITS, is_normed: bool = False) -> Any:
    fake: Any = FakeThere(*there)
    out = RoutingBias(bias, is_normed, fake)(None, (), routed(logits, is_normed))
    assert (out is None) == (fake.count == 0)
    return out


@pytest.mark.parametrize("is_normed", [False, True])
def test_an_expert_that_is_there_takes_the_place_of_one_within_the_bias(is_normed: bool) -> None:
    logits, weights, ids = rerouted(0.6, 2, 3, is_normed=is_normed)
    assert torch.equal(logits, LOGITS)
    assert ids.tolist() == [[0, 2]]
    assert ids.dtype is torch.long
    want = LOGITS.softmax(1)[:, [0, 2]]
    want = want / want.sum() if is_normed else want
    assert torch.allclose(weights, want)


@pytest.mark.parametrize(
    ("bias", "there"),
    [(0.4, (2, 3)), (9.0, (0, 1, 2)), (9.0, ()), (9.0, range(EXPERTS)), (0.6, (0, 2, 1))],
)
def test_the_output_stays_where_no_choice_changes(bias: float, there: tuple[int, ...]) -> None:
    assert rerouted(bias, *there) is None


def test_steps_of_several_tokens_are_left_alone() -> None:
    assert rerouted(9.0, 4, 5, logits=LOGITS.repeat(2, 1)) is None


def test_further_outputs_and_dtypes_stay() -> None:
    fake: Any = FakeThere(4, 5)
    logits, weights, ids = routed(LOGITS.bfloat16())
    out = RoutingBias(9.0, False, fake)(None, (), (logits, weights, ids.int(), "more"))
    assert out[1].dtype is torch.bfloat16
    assert out[2].dtype is torch.int32
    assert sorted(out[2].tolist()[0]) == [4, 5]
    assert out[3] == "more"
    assert fake.count == 2


@given(
    st.lists(st.integers(-40, 40), min_size=EXPERTS, max_size=EXPERTS, unique=True),
    st.sets(st.integers(0, EXPERTS - 1)),
    st.integers(0, 40),
)
def test_the_chosen_are_the_largest_with_the_bias(
    scores: list[int], there: set[int], bias: int
) -> None:
    raised = {e: s + (bias + 0.5) * (e in there) for e, s in enumerate(scores)}
    want = sorted(raised, key=lambda e: raised[e], reverse=True)[:K]
    logits = torch.tensor([scores]).float()
    out = rerouted(bias + 0.5, *there, logits=logits)
    ids = routed(logits)[2] if out is None else out[2]
    assert set(ids[0].tolist()) == set(want)


class Router(nn.Module):
    """Of some family."""

    def __init__(self, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=draw))
        self._choose = choose

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, *self._choose(logits)


def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    return routed(logits)[1:]


def normed(logits: Tensor) -> tuple[Tensor, Tensor]:
    return routed(logits, True)[1:]


def softmax_of_the_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.topk(K)
    return best.softmax(1), ids


def sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.sigmoid().topk(K)
    return weights / weights.sum(1, keepdim=True), ids


def scaled(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = plain(logits)
    return 2.5 * weights, ids


def corrected(logits: Tensor) -> tuple[Tensor, Tensor]:
    share = logits.softmax(1)
    ids = (share + torch.linspace(0, 0.5, EXPERTS)).topk(K).indices
    return share.gather(1, ids), ids


def refuses(logits: Tensor) -> tuple[Tensor, Tensor]:
    raise TypeError


def hook_of(choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> RoutingBias:
    router = Router(choose)
    site = MoESite("", nn.Module(), router, EXPERTS, AskableRouter(router, EXPERTS), None)
    fakes: Any = [FakeThere()]
    (hook,) = routing_biases(
        [site], fakes, 0.5, family="some_moe", hidden=HIDDEN, dtype=torch.float32
    )
    return hook


@pytest.mark.parametrize(
    ("choose", "is_normed"), [(plain, False), (normed, True), (softmax_of_the_largest, True)]
)
def test_how_a_family_weighs_is_found_by_trying(choose: Any, is_normed: bool) -> None:
    assert hook_of(choose)._is_normed is is_normed


@pytest.mark.parametrize("choose", [sigmoid, scaled, corrected, refuses])
def test_routers_that_choose_otherwise_are_refused_by_name(choose: Any) -> None:
    with pytest.raises(ConfigError, match="routing_bias: the routers of some_moe do not take"):
        hook_of(choose)
