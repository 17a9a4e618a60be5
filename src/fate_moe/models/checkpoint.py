"""What are the routed experts of a transformers checkpoint, one at a time?

The source that `store.convert` reads: headers at once, weights expert by expert, everything else
as bytes. Invariants: nothing of the checkpoint is executed; all files and all expert tensors are
checked before the first weight is read; one expert's weights at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.expert_index import ExpertIndex, ExpertLayer, index_experts
from fate_moe.models.load import read_skeleton
from fate_moe.models.packed import plain_config, unpack
from fate_moe.models.shards import Shards, file_digest, read_json
from fate_moe.models.weights import FLOATS, Weights
from fate_moe.quant.codec import encode
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout, choose_group
from fate_moe.store.convert import SourceLayer, SourceTensor, small_files
from fate_moe.store.format import Source, is_store
from fate_moe.store.header import ITEM_BYTES
from fate_moe.types import ExpertKey

MAX_CONFIG_COUNT = 1 << 16  # layers or experts in a config: building the skeleton takes as long


def open_checkpoint(
    folder: Path,
    *,
    group: int = 64,
    bits: int = 4,
    fitted: bool = True,
    source_id: str | None = None,
    revision: str | None = None,
) -> CheckpointSource:
    """Open a transformers folder (config.json and safetensors) as a source of experts.

    Args:
        folder: the checkpoint.
        group: preferred quantization group, 64 or 32; 32 where 64 does not divide.
        bits: 4, 8, or 16 for experts as they are. Values are never rounded at 16: experts in
            float32 get records of 32 bits.
        fitted: scales of the least error; if not, plain min-max. Of no effect at 16.
        source_id: what to call the model, such as its hub id; the folder's name if None.
        revision: hub commit, if known.
    Raises:
        ModelError: no MoE, an unsupported family, a packing other than FP8 and MXFP4, a missing
            shard or expert tensor.
        FormatError: a file breaks its format.
    Memory: headers only; no weight is read.
    """
    family, packing = _check_config(folder)
    weights = unpack(Shards(folder), folder, packing)
    index = index_experts(read_skeleton(folder).module, family, weights)
    files = {name: file_digest(folder / name) for name in small_files(folder)} | dict(
        weights.digests
    )
    name = source_id or folder.resolve().name
    origin = Source(name, revision, files)
    return CheckpointSource(folder, origin, weights, index, group=group, bits=bits, fitted=fitted)


class CheckpointSource:
    """A checkpoint as an `ExpertSource`: records of experts, and the rest as it is.

    Close it when done, or use it in a `with` statement.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        weights: Weights,
        index: ExpertIndex,
        *,
        group: int,
        bits: int,
        fitted: bool,
    ) -> None:
        self.folder = folder
        self.source = source
        self.expert_layers = index.layers
        self._resident_keys = index.resident_keys
        self._weights = weights
        self._group = group
        self._fitted = fitted
        if bits == 16 and self.dtype == "float32":
            bits = 32
        self._bits = bits
        dtype = self.dtype if bits >= 16 else ""
        self.layouts = tuple(record_layout(layer, group, bits, dtype) for layer in index.layers)

    @cached_property
    def dtype(self) -> str:
        """Dtype of the experts' matrices, such as "bfloat16"; of mixed ones, float32."""
        found = {
            FLOATS[self._weights.tensors[part.key].dtype]
            for layer in self.expert_layers
            for (name, _), parts in layer.parts.items()
            if len(layer.params[name]) == 3
            for part in parts
        }
        dtype = found.pop() if len(found) == 1 else torch.float32
        return str(dtype).removeprefix("torch.")

    @property
    def quantization(self) -> Mapping[str, object]:
        """What decides a record beside its weights."""
        source = {"source": self._fates} if self._fates else {}
        if self._bits >= 16:
            return {"bits": self._bits, **source}
        scales = {} if self._fitted else {"scales": "minmax"}
        return {"bits": self._bits, "group": self._group, **scales, **source}

    @cached_property
    def _fates(self) -> dict[str, str]:
        """What became of each packing of the experts: requantized or dequantized."""
        packings = self._weights.packings
        found = {
            packings[part.key]
            for layer in self.expert_layers
            for parts in layer.parts.values()
            for part in parts
            if part.key in packings
        }
        return dict.fromkeys(sorted(found), "dequantized" if self._bits >= 16 else "requantized")

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
            for layer, layout in zip(self.expert_layers, self.layouts, strict=True)
        )

    @cached_property
    def resident(self) -> tuple[SourceTensor, ...]:
        """Everything that is no routed expert; wide dtypes first, so that all are aligned."""
        entries = [self._weights.tensors[key] for key in self._resident_keys]
        entries.sort(key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))
        return tuple(entries)

    def expert(self, key: ExpertKey) -> dict[str, Tensor]:
        """Read one expert: parameter name -> matrix [out, in] or bias [out], source dtype.

        Raises:
            FormatError: a shard ends too early or cannot be read.
        """
        layer = self.expert_layers[key.layer]
        return {name: self._parameter(layer, name, key.expert) for name in layer.params}

    def record(self, key: ExpertKey) -> memoryview:
        """Read one expert and make its record; uint8 [record_bytes].

        Raises:
            ModelError: the weights cannot be quantized (NaN, infinity).
            FormatError: a shard ends too early or cannot be read.
        """
        where = f"{self.expert_layers[key.layer].path}, expert {key.expert}"
        layout = self.layouts[key.layer]
        record = encode(layout, self.expert(key), fitted=self._fitted, where=where)
        return memoryview(record.numpy().data)

    def read_resident(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one resident tensor in pieces of at most 8 MiB."""
        return self._weights.pieces(name)

    def small_file(self, name: str) -> bytes:
        """Read one of `small_files`; a config without what no longer holds of the weights."""
        data = (self.folder / name).read_bytes()
        return plain_config(data) if name == "config.json" else data

    def close(self) -> None:
        """Close the files."""
        self._weights.close()

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _parameter(self, layer: ExpertLayer, name: str, expert: int) -> Tensor:
        tensors = []
        for part in layer.parts[name, expert]:
            tensor = self._weights.load(part.key, expert if part.is_fused else None)
            tensors.append(tensor.mT if part.is_flipped else tensor)
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 0)
        return joined.mT if layer.transposed and joined.dim() == 2 else joined


def record_layout(layer: ExpertLayer, group: int, bits: int, dtype: str) -> RecordLayout:
    """Lay out one expert of a layer; matrices as [out, in] whatever the model's orientation.

    Args:
        group: preferred quantization group, of no effect where values are kept.
        bits, dtype: as in `RecordLayout`.
    Raises:
        ModelError: no group size divides a matrix's inputs.
    """
    matrices, biases = [], []
    for name, (_, *shape) in layer.params.items():
        if len(shape) == 1:
            biases.append(BiasSpec(name, shape[0]))
            continue
        rows, cols = reversed(shape) if layer.transposed else shape
        chosen = 0 if dtype else choose_group(f"{layer.path}.{name}", cols, group)
        matrices.append(MatrixSpec(name, rows, cols, chosen))
    return RecordLayout(tuple(matrices), tuple(biases), bits, dtype)


def _check_config(folder: Path) -> tuple[str, object]:
    """Check the untrusted config before transformers sees it; return family and packing."""
    if is_store(folder):
        raise ModelError(f"{folder}: is already a store")
    fields = read_json(folder / "config.json")
    packing = None
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        packing = part.get("quantization_config") if packing is None else packing
        for name, value in part.items():
            is_count = "layers" in name or "experts" in name
            if is_count and isinstance(value, int) and abs(value) > MAX_CONFIG_COUNT:
                raise FormatError(f"{folder / 'config.json'}: {name} is {value}")
    family = fields.get("model_type")
    if not isinstance(family, str):
        raise ModelError(f"{folder / 'config.json'}: model_type is {family!r:.80}")
    return family, packing
