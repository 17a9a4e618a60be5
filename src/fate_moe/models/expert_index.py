"""Which checkpoint tensors make up each routed expert?

Maps every checkpoint key with transformers' own conversion mapping to the parameter it loads into,
so that no family needs code here. The only user of that mapping.

Invariants: every parameter of every expert of every MoE layer has its tensors, with the right
shapes and dtypes, or ModelError names the missing one; a conversion we do not know is an error
and never a guess. No weight is read.
Source: transformers 5.23, core_model_loading.py (`rename_source_key`, `WeightConverter`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.errors import ModelError
from fate_moe.models.seam import find_experts, is_linear_in_up
from fate_moe.models.weights import FLOATS, Weights

_EXPERT_IN_KEY = re.compile(r"experts\.(\d+)\.")
_SPLIT_BY_EXPERT = "ErnieFuseAndSplitTextVisionExperts"
_KNOWN_OPERATIONS = {
    "MergeModulelist",
    "Concatenate",
    "Transpose",
    "Interleave",
    _SPLIT_BY_EXPERT,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor that is an expert parameter, or a run of its rows.

    Attributes:
        key: tensor name in the checkpoint.
        is_fused: the tensor holds all experts along its first dimension.
        is_flipped: its last two dimensions are swapped with respect to the model's parameter.
        is_interleaved: the rows of the parameter's two halves alternate.
    """

    key: str
    is_fused: bool
    is_flipped: bool
    is_interleaved: bool = False

    def arranged(self, tensor: Tensor) -> Tensor:
        """Bring one expert's tensor, as it was read, into the model's order."""
        if self.is_flipped:
            tensor = tensor.mT
        if self.is_interleaved:
            tensor = torch.cat((tensor[0::2], tensor[1::2]))
        return tensor


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts module of one MoE layer.

    Attributes:
        path: module path.
        num_experts: E.
        transposed: the module keeps its matrices as [in, out].
        params: parameter name -> shape in the module, first size E.
        parts: (parameter name, expert) -> its tensors, in the order they are joined.
        linear_in_up: the expert is linear in the second half of its gate_up_proj.
    """

    path: str
    num_experts: int
    transposed: bool
    params: Mapping[str, tuple[int, ...]]
    parts: Mapping[tuple[str, int], tuple[Part, ...]]
    linear_in_up: bool = False


_Place = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True)
class ExpertIndex:
    """All MoE layers in model order, and the keys of everything else.

    Attributes:
        skeleton: the model that was asked, on the meta device.
        parameters: of `resident_keys` that hold a whole parameter as it is, the parameter's name.
    """

    layers: tuple[ExpertLayer, ...]
    resident_keys: tuple[str, ...]
    skeleton: nn.Module
    parameters: Mapping[str, str]


def index_experts(skeleton: nn.Module, family: str, weights: Weights) -> ExpertIndex:
    """Sort a checkpoint's tensors into routed experts and the rest.

    Args:
        skeleton: the model on the meta device, experts included.
        family: its model_type, for messages.
        weights: the checkpoint.
    Raises:
        ModelError: no MoE, an unsupported family, or a missing or unusable expert tensor.
    """
    modules = experts_of(skeleton, family)
    params = {path: _params(path, module) for path, module in modules.items()}
    found: dict[tuple[str, str], list[_Found]] = {}
    resident: list[str] = []
    parameters: dict[str, str] = {}
    names = _Names(skeleton, family)
    # The library's order: some renamings look at what came before.
    for key in sorted(weights.tensors, key=_natural):
        found_key = names.target(key)
        path, name, expert = _place(found_key, params)
        if name in params.get(path, ()):
            item = replace(found_key, expert=expert)
            found.setdefault((path, name), []).append(item)
        elif not names.is_ignored(found_key.targets[0]):
            resident.append(key)
            if found_key.is_whole:
                parameters[key] = found_key.targets[0]
    layers = []
    for path, module in modules.items():
        parts: dict[tuple[str, int], tuple[Part, ...]] = {}
        for name, shape in params[path].items():
            for expert, joined in enumerate(_join(found.get((path, name), []), shape[0])):
                where = f"{path}.{name}, expert {expert}"
                parts[name, expert] = _check_parts(where, joined, shape, weights)
        num_experts = next(iter(params[path].values()))[0]
        transposed = bool(getattr(module, "is_transposed", False))
        linear = is_linear_in_up(module)
        layers.append(ExpertLayer(path, num_experts, transposed, params[path], parts, linear))
    return ExpertIndex(tuple(layers), tuple(resident), skeleton, parameters)


def experts_of(skeleton: nn.Module, family: str) -> dict[str, nn.Module]:
    """Find the experts modules by path, in model order.

    Raises:
        ModelError: there are none; says whether the family is no MoE or lies outside of
            transformers' experts interface.
    """
    found = find_experts(skeleton)
    if found:
        return found
    names = (path.rpartition(".")[2] for path, _ in skeleton.named_modules())
    if any("expert" in name or "moe" in name for name in names):
        raise ModelError(
            f"{family} is an MoE outside of transformers' experts interface: not supported; "
            "`fate models` lists what is"
        )
    raise ModelError(f"{family} is not a Mixture-of-Experts model: it has no routed experts")


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint tensor of a parameter: its place `order` among `count` joined ones."""

    key: str
    targets: tuple[str, ...]  # several: the experts of all of them are numbered through
    order: int = 0
    count: int = 1
    flip: str | None = None  # None, "always", or "by shape"
    interleaved: bool = False
    expert: int | None = None  # None: fused, all experts
    is_whole: bool = False  # it is the parameter, under the same name or another


def _place(found: _Found, params: Mapping[str, Mapping[str, tuple[int, ...]]]) -> _Place:
    """Return module path, parameter name and expert of a checkpoint tensor."""
    match = _EXPERT_IN_KEY.search(found.key)
    expert = int(match.group(1)) if match else None
    path, _, name = found.targets[0].rpartition(".")
    if len(found.targets) > 1 and expert is not None and name in params.get(path, ()):
        which, expert = divmod(expert, params[path][name][0])
        if which >= len(found.targets):
            raise ModelError(f"{found.key}: the config has fewer experts")
        path = found.targets[which].rpartition(".")[0]
    return path, name, expert


class _Names:
    """Maps checkpoint keys to parameter names."""

    def __init__(self, skeleton: Any, family: str) -> None:
        # Heavy, and only conversion needs it.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        conversions = get_model_conversion_mapping(skeleton)
        self._rename = rename_source_key
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = skeleton.base_model_prefix
        self._meta = skeleton.state_dict()
        patterns = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in patterns]
        # The text part of a multimodal model: nothing of the towers is loaded.
        self._is_part = skeleton.config.model_type != family

    def is_ignored(self, target: str) -> bool:
        """Whether the model never loads this key, such as the layers of an MTP head."""
        if target in self._meta:
            return False
        return self._is_part or any(p.search(target) for p in self._ignored)

    def target(self, key: str) -> _Found:
        """Say which parameter, or which part of one, a tensor is.

        Raises:
            ModelError: the mapping transforms the tensor in a way we do not know.
        """
        target, pattern = self._rename(
            key, self._renamings, self._converters, self._prefix, self._meta
        )
        if pattern is None:
            return _Found(key, (target,), is_whole=True)
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        kinds = {type(operation).__name__: operation for operation in converter.operations}
        unknown = sorted(kinds.keys() - _KNOWN_OPERATIONS)
        if unknown and "experts" in target:
            raise ModelError(f"{key}: transformers converts it by {unknown[0]}: not supported yet")
        flip = None
        if "Transpose" in kinds:
            flip = "by shape" if kinds["Transpose"].check_dims else "always"
        targets = (target,)
        if _SPLIT_BY_EXPERT in kinds:
            first, *others = converter.target_patterns
            targets += tuple(target.replace(first, other) for other in others)
        return _Found(
            key,
            targets,
            converter.source_patterns.index(pattern),
            len(converter.source_patterns),
            flip,
            "Interleave" in kinds,
        )


def _params(path: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if not shapes or any(not 2 <= len(shape) <= 3 for shape in shapes.values()):
        raise ModelError(f"{path}: unknown expert parameters {shapes}: not supported yet")
    return shapes


def _join(found: list[_Found], num_experts: int) -> list[list[_Found]]:
    """Collect the tensors of each expert, in joining order."""
    by_expert: list[list[_Found]] = [[] for _ in range(num_experts)]
    for item in sorted(found, key=lambda item: item.order):
        for expert in range(num_experts) if item.expert is None else (item.expert,):
            if expert >= num_experts:
                raise ModelError(f"{item.key}: the config has only {num_experts} experts")
            by_expert[expert].append(item)
    return by_expert


def _check_parts(
    where: str, found: list[_Found], param: tuple[int, ...], weights: Weights
) -> tuple[Part, ...]:
    """Check that the tensors of one expert's parameter join to its shape."""
    if not found or [item.order for item in found] != list(range(found[0].count)):
        have = ", ".join(item.key for item in found) or "none"
        raise ModelError(f"{where}: tensors are missing in the checkpoint, found: {have}")
    parts, rows = [], 0
    for item in found:
        entry = weights.tensors[item.key]
        shape = entry.shape
        if item.expert is None:
            if shape[:1] != param[:1]:
                raise ModelError(f"{item.key}: holds {shape[:1]} experts, need {param[0]}")
            shape = shape[1:]
        flip = item.flip == "always" or (item.flip == "by shape" and shape != param[1:])
        shape = shape[::-1] if flip else shape
        if entry.dtype not in FLOATS:
            raise ModelError(f"{item.key}: is {entry.dtype}, need one of {', '.join(FLOATS)}")
        if len(shape) != len(param) - 1 or shape[1:] != param[2:]:
            raise ModelError(f"{item.key}: shape {shape} does not fit {where} {param[1:]}")
        rows += shape[0]
        parts.append(Part(item.key, item.expert is None, flip, item.interleaved))
    if rows != param[1]:
        raise ModelError(f"{where}: {rows} rows in the checkpoint, the model has {param[1]}")
    return tuple(parts)


def _natural(key: str) -> list[tuple[float, str]]:
    """Sort key that counts: layer 2 before layer 10, numbers before words."""
    return [(int(p), "") if p.isdecimal() else (math.inf, p) for p in key.split(".")]
