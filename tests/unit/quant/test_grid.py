"""Does a grid that is known win where it loses less, and do codes that are given stay?"""

import pytest
import torch
from torch import Tensor

from fate_moe.errors import ModelError
from fate_moe.quant.codec import decode, encode
from fate_moe.quant.grid import Grid, better
from fate_moe.quant.quantize import Quantized, quantize
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout


def values(found: Quantized) -> Tensor:
    scale = found.scale.float().repeat_interleave(32, 1)
    return (found.codes.float() - found.zero.float().repeat_interleave(32, 1)) * scale


def on_a_grid(bits: int, rows: int = 64, groups: int = 4) -> tuple[Tensor, Grid]:
    """Weights on a grid, of which no group uses the extreme codes."""
    torch.manual_seed(0)
    codes = torch.randint(3, 2**bits - 4, (rows, groups * 32)).float()
    scale = (torch.rand(rows, groups) * 0.02 + 0.01).half().float()
    zero = (torch.rand(rows, groups) * 15).half().float()
    weight = (codes - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    return weight, Grid(scale, zero)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_own_grid_is_found_again(bits: int) -> None:
    weight, grid = on_a_grid(bits)
    found = quantize(weight, 32, bits=bits)
    assert not torch.equal(values(found), weight)
    assert torch.equal(values(better(weight, found, grid, bits=bits)), weight)


def test_a_worse_grid_changes_nothing() -> None:
    weight, grid = on_a_grid(4)
    found = quantize(weight, 32)
    for factor in (0.0, 1.5, float("nan"), float("inf")):
        worse = Grid(grid.scale * factor, grid.zero * factor)
        kept = better(weight, found, worse, bits=4)
        assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))


def test_each_group_has_its_own_winner() -> None:
    weight, grid = on_a_grid(4)
    grid.scale[:, 0] = float("nan")
    found = quantize(weight, 32)
    mixed = values(better(weight, found, grid, bits=4))
    assert torch.equal(mixed[:, :32], values(found)[:, :32])
    assert torch.equal(mixed[:, 32:], weight[:, 32:])


LAYOUT = RecordLayout((MatrixSpec("up", 64, 128, 32),), (BiasSpec("bias", 64),))


def test_given_codes_are_kept_bit_for_bit() -> None:
    torch.manual_seed(1)
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    given = Quantized(codes, torch.randn(64, 4).half(), torch.full((64, 4), 8.0).half())
    record = encode(LAYOUT, {"up": given, "bias": torch.ones(64)})
    assert torch.equal(decode(LAYOUT, record, torch.float32)["up"], values(given))


def test_a_grid_reaches_the_record() -> None:
    weight, grid = on_a_grid(4)
    tensors = {"up": weight, "bias": torch.ones(64)}
    assert not torch.equal(decode(LAYOUT, encode(LAYOUT, tensors), torch.float32)["up"], weight)
    record = encode(LAYOUT, tensors, grids={"up": grid})
    assert torch.equal(decode(LAYOUT, record, torch.float32)["up"], weight)


def test_codes_that_do_not_fit_are_refused() -> None:
    codes, half = torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 4).half()
    good, bias = Quantized(codes, half, half), torch.ones(64)
    for given, says in (
        (good._replace(codes=codes[:1]), r"x: up has shape \(1, 128\)"),
        (good._replace(scale=half[:, :2]), r"x: up has scales \(64, 2\), need \(64, 4\)"),
        (good._replace(zero=half[:, :2]), r"x: up has scales"),
        (good._replace(codes=codes + 16), "x: up holds the code 16, need 4 bits"),
        (good._replace(scale=half * float("nan")), "x: up holds NaN"),
        (good._replace(zero=half * float("inf")), "x: up holds NaN or infinity"),
    ):
        with pytest.raises(ModelError, match=says):
            encode(LAYOUT, {"up": given, "bias": bias}, where="x")
    with pytest.raises(ModelError, match="bias is codes, need values"):
        encode(
            RecordLayout((MatrixSpec("up", 64, 128, 32),), (BiasSpec("bias", 128),)),
            {"up": good, "bias": Quantized(codes[0], half, half)},
        )
    plain = RecordLayout((MatrixSpec("up", 64, 128, 0),), (BiasSpec("bias", 64),), 32, "float32")
    with pytest.raises(ModelError, match="up is codes, need values"):
        encode(plain, {"up": good, "bias": bias})
