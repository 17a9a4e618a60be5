"""Which rotary embedding does a GGUF describe?

Invariant: what would turn positions differently is used or refused, never passed over.
Sources: llama.cpp 0c1e57098, conversion/base.py and conversion/llama.py (what is written),
src/llama-model.cpp (what a missing key means), src/llama-context.cpp (what turns by which factor).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_header import GgufTensor
from fate_moe.models.gguf_metadata import ROPE_FREQS, Gguf, shortest

Entries = dict[str, object]

_YARN = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}
# Keys that no family here knows, with the values that change nothing.
_NEUTRAL = {"attn_factor": (1.0,), "yarn_ext_factor": (1.0, -1.0), "alpha": (0.0,)}
_MAX_PAIRS = 1 << 12  # of numbers that a head turns
# All published configs of the type have these; the file has only what comes of them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_rope(gguf: Gguf) -> Entries:
    """Return transformers' `rope_parameters`.

    Raises:
        ModelError: a scaling that transformers' families here do not have.
        FormatError: values of the wrong kind.
    """
    for key, neutral in _NEUTRAL.items():
        name = f"rope.scaling.{key}"
        if gguf.find(name) is not None and gguf.number(name) not in neutral:
            raise ModelError(
                f"{gguf.path}: {gguf.architecture}.{name} is {gguf.number(name)}, which is not "
                "supported"
            )
    rope: Entries = {"rope_type": "default", "rope_theta": gguf.number("rope.freq_base", 10000.0)}
    factor = _factor(gguf)
    kind = gguf.find("rope.scaling.type") or "linear"  # which is what a factor alone means
    if kind == "yarn":
        rope |= _yarn(gguf, factor)
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": kind, "factor": factor}
    elif kind not in ("linear", "none"):
        raise ModelError(f"{gguf.path}: rope scaling {kind!r:.40} is none of linear, yarn")
    if ROPE_FREQS in gguf.tensors:
        rope |= _llama3(gguf, rope)
    return rope


def _factor(gguf: Gguf) -> float:
    """Return by how much positions shrink; 1 where the file does not say, or says 0."""
    old = gguf.number("rope.scale_linear", 0)
    factor = gguf.number("rope.scaling.factor", old) or 1.0
    if factor < 0:
        raise FormatError(f"{gguf.path}: {gguf.architecture}.rope.scaling.factor is {factor}")
    return factor


def _yarn(gguf: Gguf, factor: float) -> Entries:
    original = gguf.count("rope.scaling.original_context_length")
    rope: Entries = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
    }  # fmt: skip
    for key, name in _YARN.items():
        if gguf.find(f"rope.scaling.{key}") is not None:
            rope[name] = gguf.number(f"rope.scaling.{key}")
    if gguf.find("rope.scaling.yarn_log_multiplier") is not None:
        if gguf.architecture != "deepseek2":  # of others it is not known in which unit
            raise ModelError(
                f"{gguf.path}: {gguf.architecture}.rope.scaling.yarn_log_multiplier is not "
                "supported"
            )
        # The file has 0.1 * mscale_all_dim; published configs have mscale equal to it.
        scale = shortest(gguf.number("rope.scaling.yarn_log_multiplier") * 10)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return rope


def _llama3(gguf: Gguf, rope: Entries) -> Entries:
    """Find the llama3 scaling whose divisors of the frequencies the file has as a tensor."""
    tensor = gguf.tensors[ROPE_FREQS]
    if tensor.type != "F32" or len(tensor.shape) != 1 or not 0 < tensor.shape[0] <= _MAX_PAIRS:
        raise FormatError(f"{gguf.path}: {ROPE_FREQS} is {tensor.type} {tensor.shape}")
    found = _read(tensor)
    scaling = {"rope_type": "llama3", "factor": shortest(found.max().item()), **_LLAMA3}
    wanted = _divisors(len(found), float(str(rope["rope_theta"])), float(str(scaling["factor"])))
    is_known = gguf.architecture in ("llama", "granitemoe") and rope["rope_type"] == "default"
    if not is_known or not torch.allclose(found.double(), wanted, rtol=1e-5, atol=0):
        raise ModelError(
            f"{gguf.path}: {ROPE_FREQS} does not come of the llama3 scaling as published: this "
            "variant is not supported; use the model's safetensors"
        )
    return scaling


def _divisors(pairs: int, base: float, factor: float) -> Tensor:
    """Compute what llama3 scaling divides each frequency by: float64 [pairs]."""
    context = _LLAMA3["original_max_position_embeddings"]
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = context * base ** -(torch.arange(pairs).double() / pairs) / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _read(tensor: GgufTensor) -> Tensor:
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
    except OSError as error:
        raise FormatError(f"{tensor.path}: cannot be read: {error.strerror or error}") from error
    if len(data) != tensor.nbytes:
        raise FormatError(f"{tensor.path}: ends in tensor {ROPE_FREQS}; it changed while we read")
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").copy())
