"""Is the committed recipe well formed, and does carving rearrange without changing anything?"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fate_moe.errors import FormatError
from fate_moe.reference import recipe as recipes
from fate_moe.reference.recipe import LayerRecipe, carve_ffn, read_recipe
from fate_moe.reference.smolmoe import RECIPE_PATH

RECIPE_BYTES_MAX = 3_000_000


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


def test_recipe_is_small_finite_and_of_the_declared_shapes() -> None:
    recipe = read_recipe(RECIPE_PATH)
    assert RECIPE_PATH.stat().st_size <= RECIPE_BYTES_MAX
    rank = recipe.correction_scale.shape[1]
    assert recipe.router.shape == (30, 24, 576)
    assert recipe.correction_out.shape == (30, 576, rank)
    assert recipe.correction_in.shape == (30, rank, 768)
    assert recipe.router.isfinite().all()
    assert recipe.correction_scale.isfinite().all()


def test_no_expert_is_a_copy_of_another_in_the_router() -> None:
    for layer in range(recipes.NUM_LAYERS):
        rows = F.normalize(read_recipe(RECIPE_PATH).layer(layer).router, dim=1)
        alike = (rows @ rows.T).fill_diagonal_(0)
        assert alike.max() < 0.99


@pytest.mark.parametrize("with_correction", [False, True])
def test_all_experts_together_equal_the_dense_block(with_correction: bool) -> None:
    torch.manual_seed(1)
    hidden, experts, width, shared = 16, 4, 8, 32
    dense = width * experts + shared
    gate, up, down = (
        torch.randn(dense, hidden),
        torch.randn(dense, hidden),
        torch.randn(hidden, dense),
    )
    order = torch.randperm(dense)
    correction = torch.randn(hidden, shared) if with_correction else None
    parts = carve_ffn(gate, up, down, LayerRecipe(order, torch.randn(experts, hidden), correction))

    x = torch.randn(11, hidden)
    expected = dense_ffn(x, gate, up, down)
    if correction is not None:
        first = order[:shared]
        expected = expected + (F.silu(x @ gate[first].T) * (x @ up[first].T)) @ correction.T
    torch.testing.assert_close(carved_ffn(x, parts, experts), expected, rtol=1e-4, atol=1e-3)


def test_topk_weights_are_nearly_uniform() -> None:
    """On random gate inputs of the norm that an RMS norm with unit gain gives."""
    torch.manual_seed(2)
    x = F.normalize(torch.randn(256, recipes.HIDDEN_SIZE), dim=1) * recipes.HIDDEN_SIZE**0.5
    for layer in (0, 14, 29):
        router = read_recipe(RECIPE_PATH).layer(layer).router * recipes.ROUTER_SPREAD
        chosen = (x @ router.T).softmax(-1).topk(recipes.TOP_K).values
        weights = chosen / chosen.sum(-1, keepdim=True) * recipes.TOP_K
        assert (weights - 1).abs().max() < 0.1


@pytest.mark.parametrize("damage", ["not safetensors", "repeated neuron", "missing tensor"])
def test_damaged_recipe_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "recipe.safetensors"
    tensors = load_file(RECIPE_PATH)
    if damage == "not safetensors":
        path.write_bytes(b"not a recipe")
    elif damage == "repeated neuron":
        tensors["permutation"][3, 0] = tensors["permutation"][3, 1]
        save_file(tensors, path)
    else:
        del tensors["router"]
        save_file(tensors, path)
    with pytest.raises(FormatError) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)
