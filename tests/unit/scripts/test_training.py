"""Does the training compute the gradients it claims, on the data it claims, in order?"""

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from fate_moe.models.checkpoint import record_layout
from fate_moe.models.expert_index import ExpertLayer
from fate_moe.quant.balance import BALANCED, balance, loudness
from fate_moe.quant.codec import decode, encode
from fate_moe.reference.recipe import Delta, LayerRecipe, carve_ffn


class Words:
    """A tokenizer: every word that is a number is a token, that number."""

    def __call__(self, text: Any, **_: Any) -> BatchEncoding:
        many = [text] if isinstance(text, str) else text
        ids = [[int(word) for word in one.split() if word.isdigit()] for one in many]
        return BatchEncoding({"input_ids": ids[0] if isinstance(text, str) else ids})


def block_of(student: Any, rank: int = 8) -> tuple[Any, LayerRecipe, Any]:
    torch.manual_seed(0)
    mlp = SimpleNamespace(
        gate_proj=nn.Linear(64, 160, bias=False),
        up_proj=nn.Linear(64, 160, bias=False),
        down_proj=nn.Linear(160, 64, bias=False),
    )
    recipe = LayerRecipe(torch.randperm(160), torch.randn(4, 64), 32, {})
    return student.CarvedBlock(mlp, recipe, rank), recipe, mlp


def test_gradients_of_a_delta_are_those_of_the_whole_matrix(student: Any) -> None:
    torch.manual_seed(1)
    linear = student.DeltaLinear(torch.randn(64, 96), rank=8)
    linear.out.data.normal_()
    linear.refresh(False)
    x = torch.randn(2, 7, 96, requires_grad=True)
    slope = torch.randn(2, 7, 64)
    linear(x).backward(slope)
    found = [x.grad, linear.out.grad, linear.into.grad]
    factors = linear.shipped_out, linear.shipped_into
    out, into = (p.clone().requires_grad_() for p in factors)
    assert not torch.equal(out, linear.out)
    y = x.detach().clone().requires_grad_()
    (y @ (linear.base + out @ into).T).backward(slope)
    wanted = slope @ linear.effective, out.grad, into.grad
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_delta_starts_where_its_recipe_ended(student: Any) -> None:
    torch.manual_seed(2)
    delta = Delta.of(torch.randn(1, 64, 5), torch.randn(1, 5, 96))
    linear = student.DeltaLinear(torch.randn(64, 96), rank=8)
    linear.start(delta.out[0], delta.scale[0], delta.into[0])
    linear.refresh(False)
    again = Delta.of(linear.out.data[None], linear.into.data[None])
    assert torch.equal(again.out[..., :5], delta.out)
    assert torch.equal(again.into[:, :5], delta.into)
    torch.testing.assert_close(again.scale[:, :5], delta.scale)
    change = linear.shipped_out @ linear.shipped_into
    torch.testing.assert_close(change, delta.layer(0), rtol=1e-4, atol=1e-4)


def test_the_student_computes_with_what_ships(
    student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deltas in eight bits, their sum in bfloat16, of that the routed part in INT4."""
    monkeypatch.setattr("fate_moe.reference.recipe.TOP_K", 2)
    block, recipe, mlp = block_of(student)
    names = {"gate": block.gate, "up": block.up, "down": block.down}
    deltas = {}
    for linear in names.values():
        linear.out.data.normal_(std=0.02)
    block.refresh(True)
    for name, linear in names.items():
        deltas[name] = Delta.of(linear.out.data[None], linear.into.data[None]).layer(0)
    recipe = replace(recipe, shared_width=32, deltas=deltas)
    dense = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    carved = {k: v.detach().bfloat16() for k, v in carve_ffn(*dense, recipe).items()}
    gate, up, down = (linear.effective for linear in names.values())
    assert torch.equal(gate[:32], carved["shared_expert.gate_proj.weight"].float())
    assert torch.equal(up[:32], carved["shared_expert.up_proj.weight"].float())
    assert torch.equal(down[:, :32], carved["shared_expert.down_proj.weight"].float() / 2)
    shapes = {"gate_up_proj": (4, 2 * 32, 64), "down_proj": (4, 64, 32)}
    layout = record_layout(ExpertLayer("layer", 4, False, shapes, {}), 64, 4, "")
    for expert in range(4):
        rows = slice(32 + 32 * expert, 64 + 32 * expert)
        own = [carved[f"experts.{expert}.{part}_proj.weight"] for part in names]
        loud = loudness(torch.cat(own[:2]).float())
        matrices = dict(zip(BALANCED, balance(torch.cat(own[:2]), own[2]), strict=True))
        stored = decode(layout, encode(layout, matrices), torch.float32)
        quiet = stored["gate_up_proj"][32:] * loud[:, None]
        assert torch.equal(gate[rows], stored["gate_up_proj"][:32])
        torch.testing.assert_close(up[rows], quiet, rtol=1e-6, atol=0)
        balanced = stored["down_proj"] / loud
        torch.testing.assert_close(down[:, rows] * 2, balanced, rtol=1e-6, atol=0)


def test_between_fits_the_grid_stays_and_the_codes_move(student: Any) -> None:
    linear = block_of(student)[0].down
    linear.refresh(True)
    grid, before = linear.scale.clone(), linear.effective.clone()
    linear.out.data.normal_(std=0.2)
    linear.refresh(False)
    assert torch.equal(linear.scale, grid)
    assert not torch.equal(linear.effective[:, 32:], before[:, 32:])
    linear.refresh(True)
    assert not torch.equal(linear.scale, grid)


def test_under_autocast_products_are_bfloat16_and_routing_is_not(student: Any) -> None:
    block, _, _ = block_of(student)
    block.train()
    seen: list[torch.dtype] = []
    for linear in student.deltas_of(block):
        linear.refresh(True)
        linear.effective = linear.effective.bfloat16()
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    # Scores of 1, 1 + 2^-10, 1 + 2^-9 and 1 - 2^-10: all the same number in bfloat16.
    block.router.data[:] = (1 + torch.tensor([[0.0], [1.0], [2.0], [-1.0]]) / 1024) / 64
    x = torch.ones(1, 6, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert block.load.tolist() == [0.0, 2.0, 2.0, 0.0]
    assert out.dtype == seen[-1] == torch.bfloat16  # what goes into down was not promoted
    (out.float().square().sum() + block.balance).backward()
    for parameter in (x, *block.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    assert block.down.out.grad.abs().max() > 0
    assert block.router.grad.abs().max() > 0


def test_a_block_is_the_shared_expert_and_the_chosen_ones(student: Any) -> None:
    block, recipe, mlp = block_of(student)
    x = torch.randn(1, 9, 64)  # the effective weights are the dense ones until the first refresh
    order = recipe.permutation
    gate, up, down = (mlp.gate_proj.weight[order], mlp.up_proj.weight[order],
                      mlp.down_proj.weight[:, order])  # fmt: skip
    scores = x[0] @ recipe.router.T
    for token, own in enumerate(scores):
        best = own.topk(2)
        weights = torch.softmax(best.values * 0.5, 0) * 2
        hidden = F.silu(gate @ x[0, token]) * (up @ x[0, token])
        expected = down[:, :32] @ hidden[:32]
        for expert, weight in zip(best.indices.tolist(), weights, strict=True):
            part = slice(32 + 32 * expert, 64 + 32 * expert)
            expected = expected + weight * (down[:, part] @ hidden[part])
        torch.testing.assert_close(block(x)[0, token], expected, rtol=1e-4, atol=1e-5)


def test_load_and_balance_count_what_was_chosen(student: Any) -> None:
    block, _, _ = block_of(student)
    block.train()
    block.router.data.zero_()
    block.router.data[1], block.router.data[3] = 1 / 32, 1 / 64
    block(torch.ones(1, 6, 64))
    assert block.load.tolist() == [0.0, 2.0, 0.0, 2.0]  # two of four take everything
    share = torch.softmax(torch.tensor([0.0, 2.0, 0.0, 1.0]), 0)
    assert block.balance.item() == pytest.approx(2 * (share[1] + share[3]).item())
    block.balance.backward()
    assert block.router.grad[1].sum() > 0  # going down the slope makes the crowded one less likely
    assert block.router.grad[0].sum() < 0


def test_the_divergence_and_its_gradient_are_autograds() -> None:
    from smolmoe_loss import divergence

    torch.manual_seed(4)
    head = torch.randn(50, 16)
    student, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    wanted = torch.log_softmax(teacher @ head.T, -1)
    have = torch.log_softmax(student @ head.T, -1)
    kl = F.kl_div(have, wanted, log_target=True, reduction="batchmean")
    kl.backward()
    value, gradient = divergence(student.detach(), teacher, head)
    assert value == pytest.approx(kl.item(), rel=1e-5)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=1e-6)


def test_one_row_in_eight_is_chat_and_a_run_that_goes_on_sees_the_same_rows() -> None:
    from train_smolmoe import batches

    text, chat = torch.arange(100)[:, None], -1 - torch.arange(3)[:, None]
    rows = [int(row) for batch in islice(batches(text, chat, 2, 0), 40) for row in batch[:, 0]]
    assert [i for i, row in enumerate(rows) if row < 0] == list(range(7, 80, 8))
    assert [row for row in rows if row >= 0] == list(range(70))
    later = [int(row) for batch in islice(batches(text, chat, 2, 13), 27) for row in batch[:, 0]]
    assert later == rows[26:]


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    from train_smolmoe import WARMUP_STEPS, Trainer

    trainer = Trainer.__new__(Trainer)
    trainer.options = argparse.Namespace(tokens=1000 * 1024, rows=2, decay=0.3)
    shares = []
    for trainer.step in range(1000):
        shares.append(trainer.rate())
    assert shares[0] == pytest.approx(1 / WARMUP_STEPS)
    assert shares[WARMUP_STEPS:700] == [1.0] * (700 - WARMUP_STEPS)
    assert shares[850] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.01


def test_passages_come_from_all_blocks_and_do_not_depend_on_their_number(tmp_path: Path) -> None:
    from smolmoe_text import BLOCK_CHARS, SEQUENCE, passages

    words = "".join(f"{i % 1000:03d} " for i in range(4 * BLOCK_CHARS // 4))
    (tmp_path / "text.txt").write_text(words)
    many = passages(Words(), tmp_path / "text.txt", 12)
    assert many.shape == (12, SEQUENCE)
    assert torch.equal(passages(Words(), tmp_path / "text.txt", 5), many[:5])
    starts = [words.split()[block * BLOCK_CHARS // 4] for block in range(4)]
    assert many[:4, 0].tolist() == [int(start) for start in starts]


def test_prompts_are_many_and_different() -> None:
    from smolmoe_text import prompts

    both = prompts(0)
    assert len(both) == len(set(both)) > 900
    assert both != prompts(1)


def test_a_heldout_text_is_cut_or_refused_in_one_line(tmp_path: Path) -> None:
    from smolmoe_text import SEQUENCE, heldout

    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(4 * SEQUENCE + 100))))
    assert heldout(Words(), path, 2 * SEQUENCE)[:, 0].tolist() == [0, 2 * SEQUENCE]
    assert heldout(Words(), path, 5).shape == (1, SEQUENCE)
    for count in (0, 1, 511):
        path.write_text("7 " * count)
        with pytest.raises(SystemExit, match=rf"^{path}: text: {count} tokens.*512$"):
            heldout(Words(), path, 2 * SEQUENCE)


def test_chats_are_kept_for_the_same_seed_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import smolmoe_text

    made = []

    def chats(model: Any, tokenizer: Any, rows: int, seed: int, batch: int) -> Tensor:
        made.append((rows, seed, batch))
        return torch.full((rows, 4), 10 * seed + batch)

    monkeypatch.setattr(smolmoe_text, "chats", chats)
    asked = [(3, 0, 2), (2, 0, 2), (3, 1, 2), (3, 1, 5), (3, 1, 5), (4, 1, 5)]
    for rows, seed, batch in asked:
        options = argparse.Namespace(work=tmp_path, chat_rows=rows, seed=seed, chat_batch=batch)
        found = smolmoe_text.cached_chats(None, None, options)
        assert torch.equal(found, torch.full((rows, 4), 10 * seed + batch))
    assert made == [asked[i] for i in (0, 2, 3, 5)]
    assert [path.name for path in tmp_path.iterdir()] == ["chats.safetensors"]
