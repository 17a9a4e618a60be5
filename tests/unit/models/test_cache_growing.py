"""A cache that grows in place holds what transformers' own holds, bit for bit."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fate_moe.models.cache_growing import growing_layer

WINDOW = 8


def states(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, count, 4), torch.randn(1, 2, count, 4)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("limit", [10, 400])
def test_it_holds_the_same_however_far_it_grows(window: int | None, limit: int) -> None:
    torch.manual_seed(0)
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        cache.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
    for count in [3, *[1] * 150, 20, *[1] * 80]:
        keys, values = states(count)
        seen = [cache.layers[0].update(keys, values) for cache in caches]
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        own, ours = caches[0].layers[0], growing_layer(caches[1], 0, limit)
        assert ours is caches[1].layers[0] is not None
        assert torch.equal(own.keys, ours.keys)
        assert torch.equal(own.values, ours.values)
        assert own.get_seq_length() == ours.get_seq_length()
        assert own.get_mask_sizes(1) == ours.get_mask_sizes(1)
        place = ours.row()
        assert place is not None
        assert place[3] == own.keys.shape[-2]
        assert place[0] == ours.keys.data_ptr()  # there was room: nothing moves before the write


def test_caches_of_another_kind_stay_as_they_are() -> None:
    cache = DynamicCache()
    assert growing_layer(cache, 0, 10) is None
    cache.layers.append(DynamicLayer())
    assert growing_layer(cache, 0, 10) is None  # empty
    past = DynamicSlidingWindowLayer(WINDOW)
    past.activate_past_recording()
    past.update(*states(3))
    cache.layers[0] = past
    assert growing_layer(cache, 0, 10) is None
    assert cache.layers[0] is past
