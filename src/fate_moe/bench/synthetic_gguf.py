"""How is the same made-up model written as a GGUF, for programs that read nothing else?

Tensor by tensor in Q4_0, straight from the pools that the store's records are made of; what the
store keeps as it is, is float32. Names come from gguf's own table, and for experts from here.
Sources: gguf 0.19, constants.py (keys) and tensor_mapping.py; llama.cpp 0c1e57098, src/models/
(which tensors and keys an architecture wants).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray

from fate_moe.bench.shapes import Shape
from fate_moe.bench.synthetic import SyntheticSource, plain_values, resident_shapes, run
from fate_moe.errors import ModelError, StoreError
from fate_moe.models.expert_index import ExpertLayer
from fate_moe.quant.record import GROUPS, MatrixSpec, choose_group
from fate_moe.store.space import check_space, write_error
from fate_moe.types import Progress, no_progress

ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "gpt_oss": "gpt-oss",
}
_SUFFIXES = (".weight", ".bias")
_BLOCK, _BLOCK_BYTES = 32, 18  # Q4_0: a scale in fp16, 32 codes


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file before it is made; `shape` as in the model, rows first."""

    name: str
    shape: tuple[int, ...]
    is_packed: bool
    make: Callable[[], NDArray[Any]]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of what `make` returns: of packed rows, their bytes."""
        if not self.is_packed:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // _BLOCK * _BLOCK_BYTES)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.byte_shape, dtype=np.int64)) * (1 if self.is_packed else 4)


def write_gguf(shape: Shape, out: Path, *, progress: Progress = no_progress) -> None:
    """Write a shape's made-up model as one GGUF file; one that is there already is kept.

    Raises:
        StoreError: the file cannot be written, or the disk has too little space.
        ModelError: the family has no GGUF architecture here.
    Memory: one tensor, of a layer's stacked experts at most.
    """
    if out.exists():
        return
    if shape.family not in ARCHITECTURES:
        raise ModelError(f"{shape.family}: not written as GGUF; known: {', '.join(ARCHITECTURES)}")
    source = SyntheticSource(shape)
    partial = out.with_name(f"{out.name}.partial")
    try:
        tensors = list(_tensors(source))
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, sum(t.nbytes for t in tensors), "free some space there")
        _write(shape, tensors, partial, progress)
        partial.rename(out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        source.close()


def _write(shape: Shape, tensors: list[_Tensor], path: Path, progress: Progress) -> None:
    writer = GGUFWriter(path, ARCHITECTURES[shape.family])
    _describe(writer, shape)
    for tensor in tensors:
        packed = GGMLQuantizationType.Q4_0 if tensor.is_packed else None
        dtype = np.dtype(np.uint8 if tensor.is_packed else np.float32)
        writer.add_tensor_info(tensor.name, tensor.byte_shape, dtype, tensor.nbytes, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(t.nbytes for t in tensors)
    for tensor in tensors:
        data = tensor.make()
        if data.nbytes != tensor.nbytes:
            raise StoreError(f"{tensor.name}: {data.nbytes} bytes made, {tensor.nbytes} announced")
        writer.write_tensor_data(data)
        done += data.nbytes
        progress("writing the GGUF", done, total)
    writer.close()


def _describe(writer: GGUFWriter, shape: Shape) -> None:
    """Write the metadata that the architecture wants."""
    config = shape.config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_name(shape.name)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if shape.family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if shape.family == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)


def _tensors(source: SyntheticSource) -> Iterator[_Tensor]:
    family = source.shape.family
    arch = next(k for k, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    layers = int(source.shape.config().num_hidden_layers)
    table = get_tensor_name_map(arch, layers)
    for name, shape in resident_shapes(source.skeleton, source.expert_layers).items():
        found = _own_name(name) or table.get_name(name, try_suffixes=_SUFFIXES)
        if found is None:
            raise ModelError(f"{family}: no tensor of a GGUF is known for {name}")
        yield _resident(source, name, str(found), shape)
    for index, layer in enumerate(source.expert_layers):
        yield from _experts(source, f"blk.{index}", layer)


def _own_name(name: str) -> str | None:
    """Name what gguf's table lacks."""
    if name.endswith(".self_attn.sinks"):
        return f"blk.{name.split('.')[2]}.attn_sinks.weight"
    return None


def _resident(
    source: SyntheticSource, name: str, gguf_name: str, shape: tuple[int, ...]
) -> _Tensor:
    path = name.removesuffix(".weight")
    matrix = source.matrices.get(path)
    if matrix is None:
        flat = shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
        return _Tensor(gguf_name, flat, False, lambda: plain_values(name, shape).reshape(flat))
    return _Tensor(gguf_name, shape, True, lambda: _packed(source, matrix, path, None))


def _packed(
    source: SyntheticSource, matrix: MatrixSpec, name: str, expert: int | None
) -> NDArray[np.uint8]:
    """Make a matrix in Q4_0: uint8 [rows, row bytes]."""
    pool = source.pool(name, matrix.group)
    data = run(pool.q4_0, pool.start(name, expert), matrix.rows * matrix.groups)
    return data.reshape(matrix.rows, -1)


def _experts(source: SyntheticSource, block: str, layer: ExpertLayer) -> Iterator[_Tensor]:
    """Yield gate, up and down of a layer, stacked over its experts; gate and up apart."""
    takes_turns = layer.transposed  # rows of gate and up alternate in the families that do
    for name, (count, *shape) in layer.params.items():
        target = "ffn_down_exps" if name.startswith("down") else ""
        if len(shape) == 1:
            parts = (target,) if target else ("ffn_gate_exps", "ffn_up_exps")
            size = shape[0] // len(parts)
            for part in parts:
                full = (count, size)
                yield _Tensor(f"{block}.{part}.bias", full, False, _zeros(full))
            continue
        rows, cols = reversed(shape) if layer.transposed else shape
        matrix = MatrixSpec(name, rows, cols, choose_group(name, cols, GROUPS[0]))
        where = f"{layer.path}.{name}"
        if target:
            whole = slice(None)
            yield _stack(source, f"{block}.{target}.weight", matrix, where, (count, whole))
            continue
        half = rows // 2
        gate, up = (
            (slice(0, None, 2), slice(1, None, 2))
            if takes_turns
            else (slice(0, half), slice(half, None))
        )
        yield _stack(source, f"{block}.ffn_gate_exps.weight", matrix, where, (count, gate))
        yield _stack(source, f"{block}.ffn_up_exps.weight", matrix, where, (count, up))


def _stack(
    source: SyntheticSource, target: str, matrix: MatrixSpec, name: str, cut: tuple[int, slice]
) -> _Tensor:
    count, rows = cut
    size = len(range(matrix.rows)[rows])

    def make() -> NDArray[np.uint8]:
        return np.stack([_packed(source, matrix, name, e)[rows] for e in range(count)])

    return _Tensor(target, (count, size, matrix.cols), True, make)


def _zeros(shape: tuple[int, ...]) -> Callable[[], NDArray[np.float32]]:
    return lambda: np.zeros(shape, dtype=np.float32)
