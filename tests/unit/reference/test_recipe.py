"""Is the committed recipe well formed, and does carving rearrange without changing anything?"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fate_moe.errors import FormatError
from fate_moe.reference import recipe as recipes
from fate_moe.reference.recipe import Delta, LayerRecipe, carve_ffn, read_recipe
from fate_moe.reference.smolmoe import RECIPE_PATH

RECIPE_BYTES_MAX = 24_000_000


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def carved_ffn(x: Tensor, parts: dict[str, Tensor], num_experts: int) -> Tensor:
    """Run every expert with the uniform weight 1 / TOP_K, as if each were among the chosen."""
    shared = (parts[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    out = torch.sigmoid(x @ parts["shared_expert_gate.weight"].T) * dense_ffn(x, *shared)
    for expert in range(num_experts):
        own = (parts[f"experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        out = out + dense_ffn(x, *own) / recipes.TOP_K
    return out


@pytest.mark.parametrize("layer", [0, 13, 29])
def test_each_layer_holds_every_neuron_once(layer: int) -> None:
    permutation = read_recipe(RECIPE_PATH).layer(layer).permutation
    assert torch.equal(permutation.sort().values, torch.arange(recipes.DENSE_WIDTH))


def test_recipe_is_small_and_finite() -> None:
    recipe = read_recipe(RECIPE_PATH)
    assert RECIPE_PATH.stat().st_size <= RECIPE_BYTES_MAX
    assert recipe.deltas.keys() == recipes.MATRICES.keys()
    assert recipe.norms.keys() == {*recipes.NORMS, "norm"}
    for name, delta in recipe.deltas.items():
        change = delta.layer(17)
        assert change.shape == recipes.MATRICES[name]
        assert change.isfinite().all()
        assert change.abs().max() > 0


def test_no_expert_is_a_copy_of_another_in_the_router() -> None:
    for layer in range(recipes.NUM_LAYERS):
        rows = F.normalize(read_recipe(RECIPE_PATH).layer(layer).router, dim=1)
        alike = (rows @ rows.T).fill_diagonal_(0)
        assert alike.max() < 0.99


@pytest.mark.parametrize("changed", [(), ("down",), ("gate", "up", "down")])
def test_all_experts_together_equal_the_dense_block(changed: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    hidden, experts, width, shared = 16, 4, 8, 32
    dense = width * experts + shared
    weights = {
        "gate": torch.randn(dense, hidden),
        "up": torch.randn(dense, hidden),
        "down": torch.randn(hidden, dense),
    }
    order = torch.randperm(dense)
    deltas = {name: torch.randn_like(weights[name]) for name in changed}
    recipe = LayerRecipe(order, torch.randn(experts, hidden), shared, deltas)
    parts = carve_ffn(*weights.values(), recipe)

    for name, delta in deltas.items():  # deltas are in carved order
        back = order.argsort()
        weights[name] = weights[name] + (delta[:, back] if name == "down" else delta[back])
    x = torch.randn(11, hidden)
    expected = dense_ffn(x, *weights.values())
    torch.testing.assert_close(carved_ffn(x, parts, experts), expected, rtol=1e-4, atol=1e-3)


def test_a_delta_survives_eight_bits() -> None:
    torch.manual_seed(2)
    out, into = torch.randn(30, 24, 5) * 0.01, torch.randn(30, 5, 16)
    delta = Delta.of(out, into)
    assert delta.out.dtype == delta.into.dtype == torch.int8
    exact = out[7] @ into[7]
    assert (delta.layer(7) - exact).norm() < 0.01 * exact.norm()


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE_PATH)
    recipe.save(tmp_path / "again.safetensors", {"tokens": "5"})
    again = read_recipe(tmp_path / "again.safetensors")
    assert torch.equal(again.router, recipe.router)
    for name in recipes.MATRICES:
        assert torch.equal(again.deltas[name].layer(3), recipe.deltas[name].layer(3))
    assert torch.equal(again.norms["norm"], recipe.norms["norm"])


DAMAGES = {
    "repeated neuron": lambda t: t["permutation"][3].__setitem__(0, t["permutation"][3, 1]),
    "missing tensor": lambda t: t.pop("router"),
    "unknown tensor": lambda t: t.update(more=torch.zeros(1)),
    "half a delta": lambda t: t.pop("gate.out"),
    "ranks differ": lambda t: t.update({"gate.out": t["gate.out"][..., :3].contiguous()}),
    "no rank": lambda t: t.update({"gate.scale": t["gate.scale"][:, :0].contiguous()}),
    "scale is one number": lambda t: t.update({"gate.scale": torch.tensor(1.0)}),
    "half of the norms": lambda t: t.pop("norm"),
    "infinity": lambda t: t["up.scale"][0].__setitem__(0, float("inf")),
    "wrong type": lambda t: t.update(router=t["router"].float()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recipe_is_refused(tmp_path: Path, damage: str) -> None:
    tensors = load_file(RECIPE_PATH)
    DAMAGES[damage](tensors)
    save_file(tensors, tmp_path / "recipe.safetensors")
    with pytest.raises(FormatError) as caught:
        read_recipe(tmp_path / "recipe.safetensors")
    assert "\n" not in str(caught.value)
    assert "recipe.safetensors" in str(caught.value)


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.safetensors").write_bytes(b"not a recipe")
    with pytest.raises(FormatError, match="not a readable recipe"):
        read_recipe(tmp_path / "recipe.safetensors")
