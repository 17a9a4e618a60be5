"""Does a whole training run, at tiny size, learn, stop, go on, and ship what it became?"""

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fate_moe.reference.recipe import Delta, Recipe


def tiny_dense() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, vocab_size=128,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
                         tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_start(seed: int = 6) -> Recipe:
    """As from the carving: a correction of down, nothing else trained."""
    torch.manual_seed(seed)
    order = torch.stack([torch.randperm(160) for _ in range(2)]).to(torch.int16)
    down = Delta.of(torch.randn(2, 64, 4) * 0.02, torch.randn(2, 4, 160))
    return Recipe(order, torch.randn(2, 4, 64).half(), {"down": down}, {})


def trainer_of(work: Path, start: Recipe | None = None, **changed: Any) -> Any:
    from train_smolmoe import SEQUENCE, Trainer

    options = {"work": work, "rows": 2, "rank": 8, "attention_rank": 4, "seed": 0, "lr": 0.01,
               "router_lr": 0.01, "balance": 0.01, "decay": 0.5, "grid_every": 2, "eval_every": 100,
               "tokens": 6 * 2 * SEQUENCE, "dtype": torch.float32,
               "device": torch.device("cpu")}  # fmt: skip
    return Trainer(tiny_dense(), start or tiny_start(), argparse.Namespace(**options | changed))


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 16 tokens: corpus, chat, held out."""
    torch.manual_seed(7)
    return tuple(torch.randint(0, 128, (n, 16)) for n in (20, 3, 4))  # type: ignore[return-value]


@pytest.fixture
def signals() -> Iterator[None]:
    """Signal handlers as they were, afterwards."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run_until(trainer: Any, last: int, number: int) -> None:
    """Run until a signal comes: before the first step, or within step `last`."""
    from train_smolmoe import run

    trainer.stop_on_signals()
    step = trainer.train_step

    def interrupted(batch: Tensor) -> None:
        if trainer.step == last - 1:
            signal.raise_signal(number)
        step(batch)

    trainer.train_step = interrupted
    if last == 0:
        signal.raise_signal(number)
    run(trainer, *texts())
    assert trainer.step == last


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(("last", "number"), [(0, signal.SIGINT), (3, signal.SIGTERM)])
def test_a_run_that_was_stopped_and_goes_on_equals_one_that_was_not(
    student: Any, tmp_path: Path, last: int, number: int
) -> None:
    from train_smolmoe import run

    (tmp_path / "other").mkdir()
    whole, first = trainer_of(tmp_path / "other"), trainer_of(tmp_path)
    run(whole, *texts())
    run_until(first, last, number)
    first.save()
    second = trainer_of(tmp_path)
    for parameter in second.named.values():
        parameter.data.add_(1)  # nothing may be left of how it began
    assert second.resume()
    run(second, *texts())
    assert second.step == whole.step == 6
    for name, parameter in whole.named.items():
        assert torch.equal(second.named[name], parameter), name
        assert second.optimizer.state[second.named[name]]["step"] == 6
    for have, want in zip(
        student.deltas_of(second.student), student.deltas_of(whole.student), strict=True
    ):
        assert torch.equal(have.effective, want.effective)
    assert (second.mean_kl, second.loads.tolist()) == (whole.mean_kl, whole.loads.tolist())


@pytest.mark.usefixtures("student")
def test_a_checkpoint_of_another_run_is_refused_in_one_line(tmp_path: Path) -> None:
    trainer_of(tmp_path).save()
    others: list[tuple[str, dict[str, Any]]] = [
        ("rows is 2, this run needs 3", {"rows": 3}),
        ("rank is 8, this run needs 9", {"rank": 9}),
        ("attention_rank is 4, this run needs 5", {"attention_rank": 5}),
        ("seed is 0, this run needs 1", {"seed": 1}),
        ("start recipe is [0-9a-f]+, this run needs [0-9a-f]+", {"start": tiny_start(8)}),
    ]
    for says, changed in others:
        with pytest.raises(SystemExit, match=rf"^\S+checkpoint.safetensors: {says}$"):
            trainer_of(tmp_path, **changed).resume()
    assert trainer_of(tmp_path, tokens=99999, lr=0.1).resume()


@pytest.mark.usefixtures("student")
def test_a_start_recipe_says_how_much_text_was_read_and_the_run_reads_on(tmp_path: Path) -> None:
    from train_smolmoe import SEQUENCE, batches, run, trained_tokens

    text, chat, rows = texts()
    trainer = trainer_of(tmp_path)
    read: list[Tensor] = []
    trainer.train_step = lambda batch: (read.append(batch), trainer.__dict__.update(step=6))
    trainer.loads, trainer.mean_kl = torch.ones(1), 0.0
    run(trainer, text, chat, rows, seen=5 * 2 * SEQUENCE - 1)
    whole = batches(text, chat, 2, 0)
    assert torch.equal(read[0], [next(whole) for _ in range(6)][5])
    tiny_start().save(tmp_path / "carved.safetensors", {})
    tiny_start().save(tmp_path / "trained.safetensors", {"tokens": "1024"})
    assert trained_tokens(tmp_path / "carved.safetensors") == 0
    assert trained_tokens(tmp_path / "trained.safetensors") == 1024


@pytest.mark.usefixtures("student")
def test_training_brings_the_student_closer_and_writes_a_curve(tmp_path: Path) -> None:
    from train_smolmoe import SEQUENCE, cut_log, record, run

    trainer = trainer_of(tmp_path, tokens=30 * 2 * SEQUENCE, eval_every=10, lr=0.02)
    text, chat, rows = texts()
    record(trainer, rows)
    trainer.train_step(text[:2])
    first = trainer.mean_kl
    run(trainer, text, chat, rows)
    trainer.mean_kl = None
    trainer.train_step(text[:2])
    assert trainer.mean_kl < 0.7 * first
    log = tmp_path / "log.jsonl"
    points = [json.loads(line) for line in log.read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 10, 20, 30]
    assert points[0]["kl"] is points[0]["load_min"] is points[0]["load_max"] is None
    assert points[-1]["perplexity"] > 1
    assert 0 <= points[-1]["load_min"] < 1 < points[-1]["load_max"]
    cut_log(log, 19)
    assert [json.loads(line) for line in log.read_text().splitlines()] == points[:2]
    cut_log(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.usefixtures("student")
def test_steps_in_bfloat16_work_and_gradients_that_are_none_end_the_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, dtype=torch.bfloat16)
    text, _, rows = texts()
    trainer.train_step(text[:2])
    assert trainer.evaluate(rows) > 1
    assert all(parameter.isfinite().all() for parameter in trainer.named.values())
    trainer.student.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.train_step(text[:2])
    assert trainer.step == 1


def test_the_student_lies_where_the_dense_model_lies(student: Any) -> None:
    made = student.make_student(tiny_dense().to("meta"), tiny_start(), 8, 4, torch.bfloat16)
    parts = [*made.named_parameters(), *made.named_buffers()]
    assert [name for name, part in parts if part.device.type != "meta"] == []


def test_a_start_recipe_of_higher_rank_is_refused(student: Any) -> None:
    start = tiny_start()
    with pytest.raises(SystemExit, match=r"^start recipe: delta of down has rank 4, --rank is 3$"):
        student.make_student(tiny_dense(), start, 3, 8, torch.float32)
    query = Delta.of(torch.randn(2, 64, 6), torch.randn(2, 6, 64))
    start = Recipe(start.permutation, start.router, {"q": query}, {})
    with pytest.raises(SystemExit, match=r"delta of q has rank 6, --attention-rank is 5$"):
        student.make_student(tiny_dense(), start, 8, 5, torch.float32)


def test_what_ships_is_what_the_student_became(student: Any, tmp_path: Path) -> None:
    from train_smolmoe import run

    trainer, dense = trainer_of(tmp_path, tokens=10 * 2 * 512), tiny_dense()
    run(trainer, *texts())
    recipe = student.recipe_of(trainer.student, trainer.start)
    assert torch.equal(recipe.permutation, tiny_start().permutation)
    for index, (layer, old) in enumerate(
        zip(trainer.student.model.layers, dense.model.layers, strict=True)
    ):
        one, mlp, attention = recipe.layer(index), old.mlp, old.self_attn
        order = one.permutation
        matrices = {
            "gate": (mlp.gate_proj.weight[order], layer.mlp.gate),
            "up": (mlp.up_proj.weight[order], layer.mlp.up),
            "down": (mlp.down_proj.weight[:, order], layer.mlp.down),
            "q": (attention.q_proj.weight, layer.self_attn.q_proj),
            "k": (attention.k_proj.weight, layer.self_attn.k_proj),
            "v": (attention.v_proj.weight, layer.self_attn.v_proj),
            "o": (attention.o_proj.weight, layer.self_attn.o_proj),
        }
        assert one.deltas.keys() == matrices.keys()
        for name, (base, linear) in matrices.items():
            change = linear.out.data @ linear.into.data
            error = base + one.deltas[name] - (linear.base + change)
            assert 0 < error.norm() < 0.02 * change.norm(), name
        assert torch.equal(recipe.router[index], layer.mlp.router.data.half())
        assert not torch.equal(recipe.router[index], trainer.start.router[index])
        for name, norm in (("input_norm", layer.input_layernorm),
                           ("post_attention_norm", layer.post_attention_layernorm)):  # fmt: skip
            assert torch.equal(recipe.norms[name][index], norm.weight.data)
            assert (norm.weight != 1).any()
    assert torch.equal(recipe.norms["norm"], trainer.student.model.norm.weight.data)


def test_paths_that_cannot_work_are_refused_before_training(tmp_path: Path) -> None:
    from train_smolmoe import check_paths

    options = argparse.Namespace(start=None, out=tmp_path / "out.safetensors")
    check_paths(options)
    options.start = tmp_path / "none.safetensors"
    with pytest.raises(SystemExit, match=r"^--start \S+none.safetensors: no such file$"):
        check_paths(options)
    options.start, options.out = None, tmp_path / "none" / "out.safetensors"
    with pytest.raises(SystemExit, match=r"^--out \S+out.safetensors: no such folder$"):
        check_paths(options)
