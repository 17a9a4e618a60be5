"""Both implementations of what `transition` computes give the same bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe import native
from fate_moe.cache.transition import NumpyLayer, make_layer

EXPERTS = 40  # more than room is made for at once

chosen = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=8, unique=True)
steps = st.tuples(st.just("step"), chosen)
reads = st.tuples(
    st.just("read"),
    st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.integers(1, 9)), min_size=1, max_size=20,
             unique_by=lambda pair: pair[0]),
)  # fmt: skip
moves = st.tuples(st.sampled_from(["enter", "leave", "worth"]), st.integers(0, EXPERTS - 1))


@pytest.mark.skipif(not native.is_available(), reason=native.why_missing)
@given(st.lists(steps | reads | moves, max_size=60))
def test_native_and_numpy_give_the_same_bits(events: list[tuple[str, object]]) -> None:
    fast, slow = make_layer(), NumpyLayer()
    assert not isinstance(fast, NumpyLayer)
    inside: set[int] = set()
    for what, given_ in events:
        for layer in (fast, slow):
            if what == "step":
                layer.step(given_)  # type: ignore[arg-type]
            elif what == "read":
                experts, counts = zip(*given_, strict=True)  # type: ignore[call-overload]
                layer.read(experts, counts, sum(counts))
            elif what == "enter":
                layer.enter(given_)  # type: ignore[arg-type]
            elif what == "leave" and given_ in inside:
                layer.leave(given_)  # type: ignore[arg-type]
        if what == "enter":
            inside.add(given_)  # type: ignore[arg-type]
        elif what == "leave":
            inside.discard(given_)  # type: ignore[arg-type]
        elif what == "worth":
            assert fast.worth(given_) == slow.worth(given_)  # type: ignore[arg-type]
        assert list(fast.ranking()) == list(slow.ranking())
        assert set(fast.ranking()) == inside
    assert [fast.worth(e) for e in range(EXPERTS)] == [slow.worth(e) for e in range(EXPERTS)]


@pytest.mark.skipif(not native.is_available(), reason=native.why_missing)
def test_what_is_out_of_range_is_refused() -> None:
    layer = make_layer()
    for wrong in (-1, 1 << 15):
        with pytest.raises(ValueError, match="expert"):
            layer.step([wrong])
        with pytest.raises(ValueError, match="expert"):
            layer.worth(wrong)
    with pytest.raises(ValueError, match="counts"):
        layer.read([1, 2, 3], [1, 2], 3)
    with pytest.raises(KeyError):
        layer.leave(3)


@pytest.mark.parametrize("make", [make_layer, NumpyLayer])
def test_what_follows_often_is_worth_more(make: type[NumpyLayer]) -> None:
    layer = make()
    for expert in (1, 2, 3):
        layer.enter(expert)
    for _ in range(20):
        layer.step([5])
        layer.step([1])
        layer.step([6])
        layer.step([2])
    layer.step([5])
    assert layer.worth(1) > layer.worth(2) > layer.worth(3)
    assert list(layer.ranking()) == [3, 2, 1]
