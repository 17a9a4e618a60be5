"""How is a model of a shape made up, with weights that are random and on the INT4 grid at once?

Every matrix is a run of groups out of a pool of random groups, at a start that its name decides.
So a weight is the same wherever it is asked for, in whatever packing, and gigabytes are written at
the disk's speed. A group of 64 is two Q4_0 blocks with one scale: store and GGUF hold the same
values (see `synthetic_gguf`). Nothing here tells a true model's quality; for time alone.

Tokens spread over the experts nearly evenly, which is the worst case for every cache. For that,
codes are 1 to 15 around a zero of 8, whose mean is 0, so that no direction grows through the
layers; and embeddings are large where what layers add is small, most of all by attention, which is
nearly the same for neighbours: a token's own direction stays what its routers see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fate_moe.bench.shapes import Shape
from fate_moe.models.checkpoint import record_layout
from fate_moe.models.expert_index import ExpertLayer, experts_of
from fate_moe.models.load import read_skeleton
from fate_moe.models.records import record_name, resident_layout, worth_codes
from fate_moe.quant.record import GROUPS, MatrixSpec
from fate_moe.store.convert import SourceLayer, SourceTensor, convert
from fate_moe.store.format import Manifest, Source
from fate_moe.store.small_files import read_small
from fate_moe.types import ExpertKey, Progress, no_progress

Bytes = NDArray[np.uint8]

ZERO = 8
WEIGHT_STD = 0.02
_CODES_STD = 4.32  # of 1..15, all equally likely
_GAINS = {"embed_tokens": 32.0, "o_proj": 1 / 8, "down_proj": 1 / 2}  # powers of two: exact in fp16
_POOL_GROUPS = 131_071  # a prime: no whole number of rows, so rows that repeat are far apart
_PIECE_GROUPS = 1 << 16


class Pool:
    """Random groups of `group` weights in each form that files want them in.

    Args:
        kind: a key of the gains, each with weights of its own; "" for everything else.
    """

    def __init__(self, group: int, kind: str = "") -> None:
        rng = np.random.default_rng((group, *kind.encode()))
        gain = _GAINS.get(kind, 1.0)
        count = _POOL_GROUPS
        self.group = group
        self.codes: Bytes = rng.integers(1, 16, (count, group), dtype=np.uint8)
        spread = rng.uniform(0.75, 1.25, count) * WEIGHT_STD / _CODES_STD
        self.scale = spread.astype(np.float16) * np.float16(gain)
        quarters = self.codes.reshape(count, 4, group // 4)
        self.high = _plane(quarters >> 2)
        self.low = _plane(quarters & 3)
        halves = self.codes.reshape(count, group // 32, 2, 16)
        nibbles = halves[:, :, 0] | halves[:, :, 1] << 4
        scales = np.repeat(self.scale.view(np.uint8).reshape(count, 1, 2), group // 32, axis=1)
        blocks: NDArray[Any] = np.concatenate([scales, nibbles], axis=2)
        self.q4_0: Bytes = blocks.reshape(count, -1)

    def start(self, name: str, expert: int | None) -> int:
        """Say at which group the weights of a matrix start."""
        key = f"{name}/{'' if expert is None else expert}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % _POOL_GROUPS


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _plane(pairs: NDArray[Any]) -> Bytes:
    packed: Bytes = pairs[:, 0] | pairs[:, 1] << 2 | pairs[:, 2] << 4 | pairs[:, 3] << 6
    return packed


def run(groups: NDArray[Any], start: int, count: int) -> Bytes:
    """Take `count` groups from `start` on, around the pool's end; bytes [count * bytes a group]."""
    parts = []
    start %= len(groups)
    while count:
        part = groups[start : start + count]
        parts.append(part)
        count -= len(part)
        start = 0
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(joined).view(np.uint8).reshape(-1)


def plain_values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Make up a tensor that stays as it is: norms are 1, biases and sinks 0, routers random."""
    if name.endswith(".weight") and len(shape) == 2:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        return (WEIGHT_STD * rng.standard_normal(shape)).astype(np.float32)
    return np.full(shape, float(name.endswith("norm.weight")), dtype=np.float32)


class SyntheticSource:
    """A made-up checkpoint of a shape, as an `ExpertSource`.

    Attributes:
        shape: its sizes.
        skeleton: the model on the meta device, experts included.
        expert_layers: the experts modules in model order.
        matrices: resident matrices that are codes, by module path.
    """

    def __init__(self, shape: Shape, resident_bits: int = 4) -> None:
        self.shape = shape
        self._bits = resident_bits
        self._scratch = TemporaryDirectory(prefix="fate-synthetic-")
        self._folder = Path(self._scratch.name)
        config = shape.config_json()
        (self._folder / "config.json").write_bytes(config)
        _write_tokenizer(self._folder)
        self._pools: dict[tuple[int, str], Pool] = {}
        self._making = Lock()
        digests = {"config.json": config, "weights": self._recipe()}
        self.source = Source(
            f"synthetic/{shape.name}", None, {name: _digest(data) for name, data in digests.items()}
        )
        skeleton = read_skeleton(self._folder)
        self.skeleton: nn.Module = skeleton.module
        self.expert_layers = tuple(
            _expert_layer(path, module)
            for path, module in experts_of(skeleton.module, shape.family).items()
        )
        self._layouts = [record_layout(layer, GROUPS[0], 4, "") for layer in self.expert_layers]
        self.matrices = worth_codes(skeleton.module)

    def pool(self, name: str, group: int) -> Pool:
        """Return the pool that a matrix is taken from, by its name and group."""
        kind = next((kind for kind in _GAINS if name.endswith(kind)), "")
        with self._making:
            if (group, kind) not in self._pools:
                self._pools[group, kind] = Pool(group, kind)
            return self._pools[group, kind]

    def _recipe(self) -> bytes:
        """What decides the weights: a store of another recipe is another source."""
        return repr(_GAINS).encode() + run(self.pool("", GROUPS[0]).q4_0, 0, 64).tobytes()

    @property
    def folder(self) -> Path:
        """Where config and tokenizer lie."""
        return self._folder

    @property
    def dtype(self) -> str:
        """What the experts of such a model are published in."""
        return "bfloat16"

    @property
    def quantization(self) -> Mapping[str, object]:
        """What decides a record beside its weights."""
        return {"bits": 4, "group": GROUPS[0], "resident_bits": self._bits}

    @cached_property
    def layers(self) -> tuple[SourceLayer, ...]:
        """MoE layers in model order."""
        return tuple(
            SourceLayer(
                path=layer.path,
                num_experts=layer.num_experts,
                record_bytes=layout.record_bytes,
                head_bytes=layout.head_bytes,
                transposed=layer.transposed,
                params=layer.params,
                layout=layout.to_json(),
            )
            for layer, layout in zip(self.expert_layers, self._layouts, strict=True)
        )

    @cached_property
    def resident(self) -> tuple[SourceTensor, ...]:
        """Everything that is no routed expert; wide dtypes first, so that all are aligned."""
        wide, half, codes = [], [], []
        for name, shape in resident_shapes(self.skeleton, self.expert_layers).items():
            matrix = self.matrices.get(name.removesuffix(".weight"))
            if matrix is None:
                wide.append(SourceTensor(name, "F32", shape))
            elif self._bits == 16:
                half.append(SourceTensor(name, "BF16", shape))
            else:
                size = resident_layout(matrix, self._bits).record_bytes
                codes.append(SourceTensor(record_name(name.removesuffix(".weight")), "U8", (size,)))
        return (*wide, *half, *codes)

    def record(self, key: ExpertKey) -> memoryview:
        """Make the record of one expert; uint8 [record_bytes]."""
        layer, layout = self.expert_layers[key.layer], self._layouts[key.layer]
        out = np.zeros(layout.record_bytes, dtype=np.uint8)
        for matrix, at in zip(layout.matrices, layout.offsets, strict=True):
            name = f"{layer.path}.{matrix.name}"
            pool = self.pool(name, matrix.group)
            start = pool.start(name, key.expert)
            for offset, piece in _sections(pool, matrix, start, at.scale, (at.high, at.low)):
                out[offset : offset + len(piece)] = piece
            _put_zeros(out, at.zero, matrix)
        return out.data

    def read_resident(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the bytes of one resident tensor."""
        path, _, kind = name.rpartition(".")
        matrix = self.matrices.get(path) if kind in ("record", "weight") else None
        if matrix is None:
            shapes = {tensor.name: tensor.shape for tensor in self.resident}
            yield plain_values(name, shapes[name]).reshape(-1).view(np.uint8).data
        elif kind == "record":
            yield self._resident_record(path, matrix).data
        else:
            yield from self._bfloat16(path, matrix)

    def small_file(self, name: str) -> bytes:
        """Read one of the small files."""
        return read_small(self._folder / name)

    def close(self) -> None:
        """Remove `folder`."""
        self._scratch.cleanup()

    def _resident_record(self, path: str, matrix: MatrixSpec) -> Bytes:
        layout = resident_layout(matrix, self._bits)
        out = np.zeros(layout.record_bytes, dtype=np.uint8)
        pool, at = self.pool(path, matrix.group), layout.offsets[0]
        planes = (at.high, at.low) if self._bits == 4 else (at.values,)
        start = pool.start(path, None)
        for offset, piece in _sections(pool, matrix, start, at.scale, planes):
            out[offset : offset + len(piece)] = piece
        _put_zeros(out, at.zero, matrix)
        return out

    def _bfloat16(self, path: str, matrix: MatrixSpec) -> Iterator[memoryview]:
        pool = self.pool(path, matrix.group)
        start, left = pool.start(path, None), matrix.rows * matrix.groups
        while left:
            count = min(left, _PIECE_GROUPS)
            codes = run(pool.codes, start, count).reshape(count, -1).astype(np.float32) - ZERO
            scale = run(pool.scale, start, count).view(np.float16).astype(np.float32)
            values = torch.from_numpy(codes * scale[:, None]).bfloat16()
            yield memoryview(values.view(-1).view(torch.uint8).numpy().data)
            start, left = start + count, left - count


def write_store(
    shape: Shape, out: Path, *, resident_bits: int = 4, progress: Progress = no_progress
) -> Manifest:
    """Write a store of random INT4 experts; one that is there already is kept.

    Args:
        out: folder of the store.
        resident_bits: of the matrices that are no routed experts: 16, 8 or 4.
    Raises:
        StoreError: it cannot be written, or holds something else.
    Memory: one resident matrix, and an expert's record for each core.
    """
    source = SyntheticSource(shape, resident_bits)
    try:
        return convert(source, out, progress=progress)
    finally:
        source.close()


def resident_shapes(
    skeleton: nn.Module, layers: tuple[ExpertLayer, ...]
) -> dict[str, tuple[int, ...]]:
    """Name every parameter that is no routed expert's, with its shape."""
    experts = tuple(f"{layer.path}." for layer in layers)
    return {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if not name.startswith(experts)
    }


def _expert_layer(path: str, module: Any) -> ExpertLayer:
    params = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    num_experts = next(iter(params.values()))[0]
    return ExpertLayer(path, num_experts, bool(getattr(module, "is_transposed", False)), params, {})


def _sections(
    pool: Pool, matrix: MatrixSpec, start: int, scale: int, planes: tuple[int, ...]
) -> Iterator[tuple[int, Bytes]]:
    """Yield where each section of a matrix lies, and its bytes: scales, then planes or codes."""
    count = matrix.rows * matrix.groups
    yield scale, run(pool.scale, start, count)
    forms = (pool.high, pool.low) if len(planes) == 2 else (pool.codes,)
    for offset, form in zip(planes, forms, strict=True):
        yield offset, run(form, start, count)


def _put_zeros(record: Bytes, offset: int, matrix: MatrixSpec) -> None:
    record[offset : offset + matrix.meta_bytes].view(np.float16)[:] = ZERO


def _write_tokenizer(folder: Path) -> None:
    # Without one a store does not open; its words mean nothing.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
