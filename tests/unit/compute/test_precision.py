"""Do the unpopular experts, and only they, run in two bits?"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.compute import light_experts, make_low_experts
from fate_moe.compute.precision import always, never, tail
from fate_moe.config import make_config
from fate_moe.engine.build import build
from fate_moe.errors import ConfigError
from fate_moe.moe import choice_of
from fate_moe.quant import codec
from tests.conftest import Open

# six tokens, top-2: expert 0 takes 5 of 12 places, 1 takes 3, 2 and 3 take 2 and 1, 4 takes 1
IDS = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [3, 4]])
STEP, ONE = choice_of(0, IDS, 16), choice_of(0, IDS[:1], 16)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, set()),
        (0.08, set()),  # less than one token
        (1 / 12, {4}),  # of two equals the higher id goes first
        (0.17, {4, 3}),
        (0.34, {4, 3, 2}),
        (0.58, {4, 3, 2}),  # expert 1 would make it 7 of 12
        (7 / 12, {4, 3, 2, 1}),
        (1.0, {4, 3, 2, 1, 0}),
    ],
)
def test_the_tail_is_the_least_popular_experts_up_to_the_share(
    share: float, expected: set[int]
) -> None:
    assert tail(STEP, share) == expected


def test_decode_keeps_four_bits() -> None:
    assert tail(ONE, 1.0) == frozenset()
    assert never(STEP) == frozenset()
    assert always(ONE) == {0, 1}


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=3, max_size=3, unique=True), min_size=2),
    st.floats(0, 1),
)
def test_the_tail_never_takes_more_than_its_share(rows: list[list[int]], share: float) -> None:
    ids = torch.tensor(rows)
    low = tail(choice_of(0, ids, 16), share)
    taken = sum(int((ids == expert).sum()) for expert in low)
    assert taken <= share * ids.numel() + 1e-6
    kept = [int((ids == expert).sum()) for expert in set(ids.flatten().tolist()) - low]
    assert all(count >= int((ids == expert).sum()) for expert in low for count in kept)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, set()), (0.1, set()), (0.11, {7}), (0.3, {7}), (0.31, {7, 2}), (1.0, {7, 2, 4})],
)
def test_light_is_what_has_less_than_the_share_of_a_tokens_weights(
    share: float, expected: set[int]
) -> None:
    for scale in (1.0, 2.5):  # some families' weights do not sum to 1
        assert light_experts([4, 2, 7], [scale * w for w in (0.6, 0.3, 0.1)], share) == expected


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="int2: 'some' is none of never, tail, always"):
        make_low_experts("some", 0.5)


def test_always_runs_every_expert_from_its_head(
    tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        four = open_engine(tiny_store, experts="50%", compute="eager").model(ids).logits
        engine = open_engine(tiny_store, experts="50%", int2="always", compute="eager")
        two = engine.model(ids).logits
        # the same decoder under the name of the other: what "always" has to equal
        monkeypatch.setattr(sys.modules["fate_moe.engine.attach"], "decode", codec.decode_int2)
        expected = open_engine(tiny_store, experts="50%", compute="eager").model(ids).logits
    assert torch.equal(two, expected)
    assert not torch.equal(two, four)
    assert "every expert computed from two bits" in engine.mode


def test_the_tail_changes_prefill_and_leaves_decode(tiny_store: Path, open_engine: Open) -> None:
    plain = open_engine(tiny_store, experts="50%")
    hybrid = open_engine(tiny_store, experts="50%", int2="tail", int2_share=0.4)
    with torch.no_grad():
        prompt = torch.arange(3, 40)[None]
        assert not torch.equal(plain.model(prompt).logits, hybrid.model(prompt).logits)
        one = torch.tensor([[17]])
        assert torch.equal(plain.model(one).logits, hybrid.model(one).logits)
    assert "at most 40% of the routed tokens" in hybrid.mode
    assert "two bits" not in plain.mode


def test_a_share_of_zero_is_four_bits_to_the_bit(tiny_store: Path, open_engine: Open) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        four = open_engine(tiny_store, experts="50%").model(ids).logits
        none = open_engine(tiny_store, experts="50%", int2="tail", int2_share=0.0).model(ids).logits
    assert torch.equal(four, none)


@pytest.mark.parametrize("choices", [{"int2": "often"}, {"int2_share": 1.5}, {"int2_share": -0.1}])
def test_bad_choices_are_refused_before_anything_is_loaded(
    tiny_store: Path, choices: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="int2"):
        build(tiny_store, make_config("fate", **choices))


def test_partial_of_tail_is_what_the_name_gives() -> None:
    chosen = make_low_experts("tail", 0.34)
    assert chosen(STEP) == partial(tail, share=0.34)(STEP) == {2, 3, 4}
