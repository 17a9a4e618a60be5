"""Balancing changes weights, never the expert, and takes error off loud neurons."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fate_moe.quant.balance import SPREAD, balance, loudness
from fate_moe.quant.quantize import quantize


def expert(neurons: int = 64, hidden: int = 96, loud: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random weights; neuron 5 reacts `loud` times as strongly as the others."""
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(2 * neurons, hidden, generator=generator) * 0.1
    gate_up[[5, neurons + 5]] *= loud
    return gate_up, torch.randn(hidden, neurons, generator=generator) * 0.05


def run(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.double().T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.double().T


def rounded(weight: Tensor) -> Tensor:
    codes, scale, zero = quantize(weight, 32)
    groups = codes.float().unflatten(1, (-1, 32))
    return ((groups - zero.float()[..., None]) * scale.float()[..., None]).flatten(1)


def test_the_expert_stays_the_same() -> None:
    gate_up, down = expert(loud=30.0)
    x = torch.randn(7, 96, dtype=torch.double)
    torch.testing.assert_close(
        run(*balance(gate_up, down), x), run(gate_up, down, x), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(balance(gate_up, down)[0][:64], gate_up[:64])


def test_rounding_hurts_less_the_louder_a_neuron_is() -> None:
    gains = []
    for loud in (1.0, 10.0, 40.0):
        gate_up, down = expert(loud=loud)
        x = torch.randn(512, 96, dtype=torch.double, generator=torch.Generator().manual_seed(2))
        want, scaled = run(gate_up, down, x), balance(gate_up, down)
        plain = (run(gate_up, rounded(down), x) - want).norm()
        balanced = (run(scaled[0], rounded(scaled[1]), x) - want).norm()
        gains.append(float(plain / balanced))
    assert gains[0] > 0.97  # nothing to gain, hardly anything to lose
    assert gains[1] > 1.5
    assert gains[2] > 3.0


def test_loudness_is_relative_and_bounded() -> None:
    gate_up, _ = expert(loud=1e6)
    found = loudness(gate_up)
    assert found[5] == SPREAD
    assert 0.5 < found[:5].min() < found[:5].max() < 2


@given(
    rows=st.lists(st.sampled_from([0.0, 1e-30, 1.0, 1e30, float("inf"), float("nan")]),
                  min_size=1, max_size=6)
)  # fmt: skip
def test_strange_weights_give_finite_scales(rows: list[float]) -> None:
    gate_up = torch.tensor(rows + rows)[:, None].expand(-1, 32)
    found = loudness(gate_up)
    assert found.isfinite().all()
    assert (found >= 1 / SPREAD).all()
    assert (found <= SPREAD).all()
