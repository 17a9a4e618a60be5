"""Is what is remembered of the meta device what torch would say again?"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fate_moe.models import kv_cache
from fate_moe.models.meta import RememberedShapes
from tests.families.exact import TEXT, auto_class
from tests.families.tiny_config import tiny_config

WHOLE = torch.empty(4, 6, dtype=torch.int64, device="meta")
REAL = torch.empty(2, 4, 6, device="meta")
HALF = REAL.half()
SLANTED = torch.empty(6, 4, device="meta").mT

# Each pair shares its shapes, and differs in what else a result depends on.
PAIRS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "whole or real number": (lambda: WHOLE * 2, lambda: WHOLE * 2.0),
    "number or truth": (lambda: WHOLE.sum(1, True), lambda: WHOLE.sum(1)),
    "dtype": (lambda: REAL + REAL, lambda: HALF + HALF),
    "dtype asked for": (lambda: REAL.to(torch.float16), lambda: REAL.to(torch.bfloat16)),
    "strides": (lambda: SLANTED + 1, lambda: SLANTED.contiguous() + 1),
    "order": (lambda: torch.cat([REAL, WHOLE[None]]), lambda: torch.cat([WHOLE[None], REAL])),
    "sides": (lambda: REAL.flip([0]), lambda: REAL.mean([0])),
    "one number of another type": (
        lambda: WHOLE + torch.ones((), dtype=torch.float64, device="meta"),
        lambda: WHOLE + torch.ones((), dtype=torch.float32, device="meta"),
    ),
}  # fmt: skip


def seen(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_remembered_is_what_torch_says(pair: str) -> None:
    wanted = [seen(ask()) for ask in PAIRS[pair]]
    with RememberedShapes():
        for _ in range(3):
            assert [seen(ask()) for ask in PAIRS[pair]] == wanted


def test_the_second_time_torch_is_not_asked() -> None:
    with RememberedShapes() as memory:
        first = REAL * 2
        assert memory.answered == 0
        second = REAL * 2
    assert memory.answered == 1
    assert first is not second
    assert seen(first) == seen(second)


def test_views_and_changes_in_place_stay_what_they_are() -> None:
    with RememberedShapes() as memory:
        for _ in range(2):
            base = torch.empty(4, 6, device="meta")
            assert base.view(24)._base is base
            assert base.add_(1) is base
            made = torch.empty(0, device="meta")
            torch.add(base, base, out=made)
            assert made.shape == base.shape
            torch.ops.aten.rrelu_with_noise(base, made, training=True)
    assert memory.answered == 2 * 2 - 2  # the two `torch.empty`, once more each


def test_tensors_with_data_are_computed() -> None:
    with RememberedShapes() as memory:
        for number in (1.0, 2.0):
            assert (torch.full((3,), number) * 2).tolist() == [2 * number] * 3
    assert memory.answered == 0


def test_numbers_that_would_need_data_are_refused_as_ever() -> None:
    with RememberedShapes():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="meta"):
                (REAL.sum() + 1).item()


def test_what_takes_two_results_has_both() -> None:
    with RememberedShapes():
        for _ in range(2):
            values, places = REAL.topk(3)
            assert (values.shape, places.shape) == ((2, 4, 3), (2, 4, 3))
            assert (values.dtype, places.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma4_text", "granitemoehybrid"])
def test_a_cache_is_as_large_as_without(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = auto_class(model_type, TEXT).from_config(tiny_config(model_type))
    memory = RememberedShapes()
    monkeypatch.setattr(kv_cache, "RememberedShapes", lambda: memory)
    have = kv_cache.kv_growth(model, torch.bfloat16)
    monkeypatch.setattr(kv_cache, "RememberedShapes", nullcontext)
    want = kv_cache.kv_growth(model, torch.bfloat16)
    assert [have(tokens) for tokens in (1, 100, 1000)] == [want(n) for n in (1, 100, 1000)]
    assert memory.answered > 100
