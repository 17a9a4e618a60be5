"""Which tensors of a GGUF make up each parameter of the model?

A GGUF keeps gate and up apart, stacks experts, and turns some rows around; a `Recipe` says how
one parameter of the transformers model comes back. Names come from gguf's own table, which knows
the names of published checkpoints, and from the few rules here.

Invariant: every parameter has its tensors in shapes that fit, and every tensor its parameter.
Sources: gguf 0.19, tensor_mapping.py; llama.cpp 0c1e57098, conversion/ (base.py: what is fused;
llama.py, granite.py, gpt_oss.py, deepseek.py: the order of rows).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from torch import Tensor

from fate_moe.errors import ModelError
from fate_moe.models.gguf_metadata import EMBEDDING, OUTPUT, ROPE_FREQS, Gguf

Arrange = Callable[[Sequence[Tensor]], Tensor]

_TURNED = {"llama", "granitemoe"}  # rows of q and k: from two halves per head to pairs
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GATE_UP = ("ffn_gate_exps", "ffn_up_exps")
# Parameters, by their name in a layer, that gguf's table lacks.
_RULES: Mapping[str, tuple[str, ...]] = {
    "experts.gate_up_proj": tuple(f"{name}.weight" for name in _GATE_UP),
    "experts.gate_up_proj_bias": tuple(f"{name}.bias" for name in _GATE_UP),
    "experts.down_proj": ("ffn_down_exps.weight",),
    "experts.down_proj_bias": ("ffn_down_exps.bias",),
    "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),
    "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",),
    "self_attn.sinks": ("attn_sinks.weight",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}
_SPLIT_KV = ("attn_k_b.weight", "attn_v_b.weight")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one parameter is put together.

    Attributes:
        sources: names of GGUF tensors.
        shape: of the parameter in the model.
        arrange: brings the sources' rows, of one expert where there are experts, in order.
        is_fused: the first dimension counts experts.
        is_transposed: the model keeps each matrix as [in, out]; rows are outputs here.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    arrange: Arrange
    is_fused: bool
    is_transposed: bool

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is its one source as it lies there."""
        return self.arrange is stacked and len(self.sources) == 1 and not self.is_transposed


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Put rows below each other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 0)


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Take rows in turns: gate 0, up 0, gate 1, ..."""
    return torch.stack(list(parts), 1).flatten(0, 1)


def cut(parts: Sequence[Tensor], start: int, rows: int, then: Arrange) -> Tensor:
    """Take a run of rows, and arrange it."""
    return then([parts[0][start : start + rows]])


def as_row(parts: Sequence[Tensor]) -> Tensor:
    """Make a vector a matrix of one row."""
    return parts[0].reshape(1, -1)


def in_halves(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Turn each head's rows from pairs (0, h, 1, h+1, ...) back into two halves (0, 1, ..)."""
    rows = parts[0]
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def joined_kv(parts: Sequence[Tensor]) -> Tensor:
    """Make kv_b of k_b [heads, rank, nope] and v_b [heads, value, rank]: per head k, then v."""
    return torch.cat([parts[0].mT, parts[1]], 1).flatten(0, 1)


def read_names(gguf: Gguf, skeleton: Any) -> dict[str, Recipe]:
    """Find the recipe of every parameter of the model.

    Args:
        gguf: the checked headers.
        skeleton: the transformers model on the meta device, experts included.
    Raises:
        ModelError: a tensor is missing, has the wrong shape, or belongs to no parameter.
    """
    finder = _Finder(gguf, skeleton)
    recipes = {
        name: finder.recipe(name, tuple(parameter.shape))
        for name, parameter in skeleton.state_dict().items()
        if not finder.is_tied(name)
    }
    used = {source for recipe in recipes.values() for source in recipe.sources}
    for name in gguf.tensors:
        if name not in used and not finder.is_extra(name):
            raise ModelError(
                f"{gguf.path}: tensor {name} belongs to no parameter of {gguf.architecture}: "
                "this variant is not supported"
            )
    return recipes


class _Finder:
    def __init__(self, gguf: Gguf, skeleton: Any) -> None:
        self._gguf = gguf
        self._layers = int(skeleton.config.num_hidden_layers)
        self._heads = int(skeleton.config.num_attention_heads)
        self._kv_heads = int(skeleton.config.num_key_value_heads)
        self._is_tied = bool(skeleton.config.tie_word_embeddings)
        transposed = (getattr(m, "is_transposed", False) for m in skeleton.modules())
        self._is_transposed = any(value is True for value in transposed)
        arch = next(k for k, name in MODEL_ARCH_NAMES.items() if name == gguf.architecture)
        self._table = get_tensor_name_map(arch, self._layers)

    def is_tied(self, name: str) -> bool:
        """Whether the parameter is another one's, by its config."""
        return self._is_tied and name == "lm_head.weight"

    def is_extra(self, name: str) -> bool:
        """Whether the model has no such parameter: frequencies are in its config, and layers that
        predict further are not loaded.
        """
        if name == ROPE_FREQS:
            return True
        match = re.match(r"blk\.(\d+)\.", name)
        return match is not None and int(match.group(1)) >= self._layers

    def recipe(self, name: str, shape: tuple[int, ...]) -> Recipe:
        sources = self._sources(name)
        for source in sources:
            self._gguf.shape(source)  # which names the one that is missing
        is_expert = ".experts." in name
        matrix = len(shape) - is_expert == 2
        recipe = Recipe(
            sources,
            shape,
            self._arrange(name, sources, shape),
            is_expert,
            is_expert and matrix and self._is_transposed,
        )
        self._check(name, recipe)
        return recipe

    def _sources(self, name: str) -> tuple[str, ...]:
        if name == "model.embed_tokens.weight":
            return (EMBEDDING,)
        if name == "lm_head.weight":
            return (OUTPUT,)
        match = _IN_LAYER.fullmatch(name)
        layer, rest = match.groups() if match else ("", name)
        if rest == "self_attn.kv_b_proj.weight":
            split = tuple(f"blk.{layer}.{source}" for source in _SPLIT_KV)
            if split[0] in self._gguf.tensors:
                return split
        qkv = _QKV.fullmatch(rest)
        fused = f"blk.{layer}.attn_qkv.{qkv.group(2)}" if qkv else ""
        if fused in self._gguf.tensors:  # as the converter's --fuse-qkv writes it
            return (fused,)
        for ending, sources in _RULES.items():
            if rest == ending or rest.endswith(f".{ending}"):
                return tuple(f"blk.{layer}.{source}" for source in sources)
        source = self._table.get_name(name, try_suffixes=(".weight", ".bias"))
        if source is None:
            raise ModelError(
                f"{self._gguf.path}: no tensor of a {self._gguf.architecture} GGUF is known for "
                f"{name}: this variant is not supported"
            )
        return (str(source),)

    def _arrange(self, name: str, sources: tuple[str, ...], shape: tuple[int, ...]) -> Arrange:
        if len(sources) == 2:
            if sources[0].endswith(_SPLIT_KV[0]):
                return joined_kv
            return interleaved if self._is_transposed else stacked
        if name.endswith("shared_expert_gate.weight"):
            return as_row
        match = _QKV.search(name)
        if match is None:
            return stacked
        kind, turned = match.group(1), self._turned(match.group(1))
        if ".attn_qkv." not in sources[0]:
            return turned
        rows, whole = shape[0], self._gguf.shape(sources[0])[0]
        start = {"q": 0, "k": whole - 2 * rows, "v": whole - rows}[kind]
        return partial(cut, start=max(0, start), rows=rows, then=turned)

    def _turned(self, kind: str) -> Arrange:
        """How the rows of q, k or v lie."""
        if self._gguf.architecture not in _TURNED or kind == "v":
            return stacked
        return partial(in_halves, heads=self._heads if kind == "q" else self._kv_heads)

    def _check(self, name: str, recipe: Recipe) -> None:
        """Put it together from tensors without content, and compare the shape."""
        shapes = [self._gguf.shape(source) for source in recipe.sources]
        parts = [torch.empty(shape, device="meta") for shape in shapes]
        first = {len(part) for part in parts} if recipe.is_fused else set()
        try:
            found = recipe.arrange([part[0] for part in parts] if recipe.is_fused else parts)
        except (RuntimeError, IndexError):
            found = torch.empty(0, device="meta")
        found = found.mT if recipe.is_transposed and found.dim() == 2 else found
        whole = (*first, *found.shape)
        if whole != recipe.shape:
            have = ", ".join(f"{source} {self._gguf.shape(source)}" for source in recipe.sources)
            raise ModelError(f"{self._gguf.path}: {have}: does not make {name} {recipe.shape}")
