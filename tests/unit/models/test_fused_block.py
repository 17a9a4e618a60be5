"""A fused MoE block whose shared expert is a record: prompts, errors on the way, who looks on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fate_moe import native
from fate_moe.errors import CacheError
from fate_moe.models import turnstile
from fate_moe.models.fused_block import FusedBlock, fuse_block
from tests.unit.models.test_fused import offloaded
from tests.unit.models.test_quantized import make_linear

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)

CODES_BOUND = 3e-2  # a last bit may move an activation's code


def make_block() -> tuple[Any, FusedBlock, list[bool]]:
    """Return a block with a shared expert of records, its fused form, and who was handed it."""
    model, given = offloaded("qwen2_moe")
    block = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(block.shared_expert, name)
        setattr(block.shared_expert, name, make_linear(old.out_features, old.in_features, 4))
    fused = fuse_block(block)
    assert fused is not None
    given.clear()
    return block, fused, given


def draw(tokens: int, width: int) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_shared_expert_of_records_is_computed_beside_the_experts(tokens: int) -> None:
    block, fused, given = make_block()
    x = draw(tokens, fused.width)
    got, want = fused.forward(x), block(x)
    assert given == [True, False]
    assert float((got - want).abs().max() / want.abs().max()) < CODES_BOUND


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_among_the_experts_leaves_nothing_half_done(tokens: int, when: str) -> None:
    block, fused, _ = make_block()
    x = draw(tokens, fused.width)
    want = fused.forward(x)
    own = block.experts.attached

    def broken(x: Tensor, ids: Tensor, weights: Tensor, beside: Callable[[], None]) -> Tensor:
        if when == "after":
            beside()
        raise OSError("the disk is gone")

    block.experts.attached = broken
    with pytest.raises(OSError, match="the disk is gone"):
        fused.forward(draw(tokens, fused.width) + 1)
    assert fused.shared is not None
    assert fused.shared._x.numel() == 0
    block.experts.attached = own
    assert torch.equal(fused.forward(x), want)


@torch.no_grad()
@pytest.mark.parametrize("part", ["gate_proj", "act_fn"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_whoever_looks_at_a_part_of_the_shared_expert_sees_it(part: str, hook: str) -> None:
    block, fused, given = make_block()
    seen = []
    getattr(getattr(block.shared_expert, part), hook)(lambda *_: seen.append(1))
    fused.forward(draw(1, fused.width))
    assert seen == [1]
    assert given == [False]


@torch.no_grad()
def test_another_activation_in_its_place_is_computed() -> None:
    block, fused, _ = make_block()
    block.shared_expert.act_fn = torch.nn.ReLU()
    x = draw(1, fused.width)
    assert torch.equal(fused.forward(x), block(x))


def elsewhere(do: Callable[[], Any]) -> Any:
    """Let another thread do something."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(do)).result(10)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_who_gives_up_waiting_leaves_what_another_thread_began(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused, _ = make_block()
    x = draw(tokens, fused.width)
    want = fused.forward(x)
    monkeypatch.setattr(turnstile, "PATIENCE_S", 0.05)
    monkeypatch.setattr(fused, "own", None)
    shared = fused.shared
    assert shared is not None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(shared.start, x).result(10)
        with pytest.raises(CacheError, match="another thread"):
            fused.forward(draw(2, fused.width))
        pool.submit(shared.finish).result(10)
    assert torch.equal(fused.forward(x), want)


@torch.no_grad()
@pytest.mark.parametrize("part", ["start", "finish"])
def test_an_error_in_the_shared_expert_keeps_nobody_out(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused, _ = make_block()
    x = draw(1, fused.width)
    want = fused.forward(x)
    shared = fused.shared
    assert shared is not None

    class Broken:
        def __getattr__(self, name: str) -> Any:
            if name == part:
                raise MemoryError("no memory")
            return getattr(block, name)

    block = shared.block
    monkeypatch.setattr(shared, "block", Broken())
    with pytest.raises(MemoryError):
        elsewhere(lambda: fused.forward(x))
    monkeypatch.setattr(shared, "block", block)
    monkeypatch.setattr(turnstile, "PATIENCE_S", 0.05)
    assert torch.equal(elsewhere(lambda: fused.forward(x)), want)
