"""What are the routed experts of a transformers checkpoint, one at a time?

The source that `store.convert` reads: headers at once, weights expert by expert, everything else
as bytes. Invariants: nothing of the checkpoint is executed; all files and all expert tensors are
checked before the first weight is read; one expert's weights at a time are in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fate_moe.errors import FormatError, ModelError
from fate_moe.models import gguf
from fate_moe.models.config_bounds import check_counts
from fate_moe.models.expert_index import ExpertIndex, ExpertLayer, experts_of, index_experts
from fate_moe.models.gguf_config import write_config
from fate_moe.models.gguf_names import read_names
from fate_moe.models.gguf_tokenizer import check_tokenizer, write_tokenizer
from fate_moe.models.load import read_skeleton
from fate_moe.models.packed import check_method, plain_config, unpack
from fate_moe.models.shards import Shards, read_json
from fate_moe.models.weights import FLOATS, Weights
from fate_moe.quant.balance import BALANCED, balance
from fate_moe.quant.codec import encode
from fate_moe.quant.grid import Grid
from fate_moe.quant.quantize import Quantized
from fate_moe.quant.record import BiasSpec, MatrixSpec, RecordLayout, choose_group
from fate_moe.store.convert import SourceLayer, SourceTensor
from fate_moe.store.format import Source, is_store
from fate_moe.store.header import ITEM_BYTES
from fate_moe.store.small_files import read_small, small_files
from fate_moe.types import ExpertKey


def open_checkpoint(
    folder: Path,
    *,
    group: int = 64,
    bits: int = 4,
    fitted: bool = True,
    source_id: str | None = None,
    revision: str | None = None,
) -> CheckpointSource:
    """Open a transformers folder (config.json and safetensors) or a GGUF as a source of experts.

    Args:
        folder: the checkpoint: a folder, or a GGUF file (of a split model, any of its files).
        group: preferred quantization group, 64 or 32; 32 where 64 does not divide.
        bits: 4, 8, or 16 for experts as they are. Values are never rounded at 16: experts in
            float32 get records of 32 bits.
        fitted: scales of the least error; if not, plain min-max. Of no effect at 16.
        source_id: what to call the model, such as its hub id; the folder's name if None.
        revision: hub commit, if known.
    Raises:
        ModelError: no MoE, an unsupported family, a packing other than FP8 and MXFP4, a missing
            shard or expert tensor, a config or tokenizer file that is too large or cannot be read.
        FormatError: a file breaks its format.
    Memory: headers only; no weight is read.
    """
    if folder.is_file():
        return _open_gguf(
            folder, Source(source_id or folder.name, revision, {}), group=group, bits=bits,
            fitted=fitted,
        )  # fmt: skip
    family, packing = _check_config(folder)
    files = {name: _digest(folder / name) for name in small_files(folder)}
    weights = unpack(Shards(folder), folder, packing)
    index = index_experts(read_skeleton(folder).module, family, weights)
    files |= weights.digests
    name = source_id or folder.resolve().name
    origin = Source(name, revision, files)
    return CheckpointSource(folder, origin, weights, index, group=group, bits=bits, fitted=fitted)


def _open_gguf(
    path: Path, origin: Source, *, group: int, bits: int, fitted: bool
) -> CheckpointSource:
    model = gguf.open_gguf(path)
    scratch = TemporaryDirectory(prefix="fate-gguf-")  # removed with its source, at the latest
    folder = Path(scratch.name)
    try:
        write_config(model, folder)
        check_tokenizer(model)
        family, _ = _check_config(folder)
        skeleton = read_skeleton(folder).module
        weights = gguf.GgufWeights(model, read_names(model, skeleton))
        index = index_experts(skeleton, family, weights)
        # The tokenizer's files follow from the GGUF; how they look is transformers' affair.
        config = {"config.json": _digest(folder / "config.json")}
        origin = replace(origin, files=config | dict(weights.digests))
        source = CheckpointSource(
            folder, origin, weights, index, group=group, bits=bits, fitted=fitted
        )
    except (ModelError, FormatError) as error:
        scratch.cleanup()
        raise type(error)(str(error).replace(scratch.name, str(path))) from error
    except BaseException:
        scratch.cleanup()
        raise
    source.scratch = scratch
    source.pending = partial(write_tokenizer, model, folder)
    return source


def check_config(folder: Path) -> None:
    """Refuse a model that could not be converted, before its weights are fetched.

    Raises:
        ModelError: no MoE, an unsupported family, or a packing other than FP8 and MXFP4.
        FormatError: config.json breaks its format.
    """
    family, packing = _check_config(folder)
    check_method(folder, packing)
    experts_of(read_skeleton(folder).module, family)


class CheckpointSource:
    """A checkpoint as an `ExpertSource`: records of experts, and the rest as it is.

    Close it when done, or use it in a `with` statement.

    Attributes:
        source: what the checkpoint is, in the manifest's words.
        index: where its experts lie, and the names of the rest.
        expert_layers: the index's layers.
        layouts: record layout per layer.
        scratch: `folder`, where it was made for this source; removed by `close`.
        pending: what is still to be written there. A store that is there already never needs it.
    """

    scratch: TemporaryDirectory[str] | None = None
    pending: Callable[[], None] | None = None

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
        self._folder = folder
        self.source = source
        self.index = index
        self.expert_layers = index.layers
        self._resident_keys = index.resident_keys
        self._weights = weights
        self._group = group
        self._fitted = fitted
        if bits == 16 and self.dtype == "float32":
            bits = 32
        self._bits = bits
        dtype = self.dtype if bits >= 16 else ""
        self.layouts = tuple(
            record_layout(layer, group, bits, dtype, self._own_groups(layer))
            for layer in index.layers
        )

    @property
    def folder(self) -> Path:
        """Where config and tokenizer lie.

        Raises:
            ModelError: the tokenizer cannot be made.
        """
        if self.pending is not None:
            self.pending()
            self.pending = None
        return self._folder

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
        scales: dict[str, object] = {} if self._fitted else {"scales": "minmax"}
        if any(self._is_balanced(layer) for layer in self.expert_layers):
            scales["balanced"] = True
        return {"bits": self._bits, "group": self._group, **scales, **source}

    @cached_property
    def _fates(self) -> dict[str, str]:
        """What became of each packing of the experts: kept, requantized, or dequantized."""
        packings = self._weights.packings
        found: dict[str, str] = {}
        for layer in self.expert_layers:
            for (name, _), parts in layer.parts.items():
                is_kept = self._own_grid(layer, name) == "codes"
                fate = "kept" if is_kept else "requantized"
                for part in parts:
                    if part.key in packings and len(layer.params[name]) == 3:
                        found[packings[part.key]] = "dequantized" if self._bits >= 16 else fate
        return dict(sorted(found.items()))

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
        layer, layout = self.expert_layers[key.layer], self.layouts[key.layer]
        tensors, grids = self._to_encode(key)
        where = f"{layer.path}, expert {key.expert}"
        record = encode(layout, tensors, grids=grids, fitted=self._fitted, where=where)
        return memoryview(record.numpy().data)

    def _to_encode(self, key: ExpertKey) -> tuple[dict[str, Tensor | Quantized], dict[str, Grid]]:
        """Read one expert as its record takes it: codes to keep, or floats; and its own grids."""
        layer = self.expert_layers[key.layer]
        if self._is_balanced(layer):
            gate_up, down = (self._parameter(layer, name, key.expert) for name in BALANCED)
            return dict(zip(BALANCED, balance(gate_up, down), strict=True)), {}
        tensors: dict[str, Tensor | Quantized] = {}
        grids: dict[str, Grid] = {}
        for name in layer.params:
            own = self._own_grid(layer, name)
            part, weights = layer.parts[name, key.expert][0].key, self._weights
            if own == "codes" and isinstance(weights, gguf.GgufWeights):
                tensors[name] = weights.codes(part, key.expert)
                continue
            tensors[name] = self._parameter(layer, name, key.expert)
            if own == "grid" and isinstance(weights, gguf.GgufWeights):
                grids[name] = weights.grid(part, key.expert)
        return tensors, grids

    def read_resident(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one resident tensor in pieces of at most 8 MiB."""
        return self._weights.pieces(name)

    def small_file(self, name: str) -> bytes:
        """Read one of `small_files`; a config without what no longer holds of the weights."""
        data = read_small(self._folder / name)
        return plain_config(data) if name == "config.json" else data

    def close(self) -> None:
        """Close the files, and remove `folder` if it is scratch."""
        self._weights.close()
        if self.scratch is not None:
            self.scratch.cleanup()

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _own_grid(self, layer: ExpertLayer, name: str) -> str:
        """What of a parameter's own grid a record can use: "codes", "grid" or nothing.

        Plain min-max is asked for to measure it; then there is nothing to keep.
        """
        weights = self._weights
        wanted = self._fitted and self._bits < 16 and len(layer.params[name]) == 3
        if not wanted or not isinstance(weights, gguf.GgufWeights):
            return ""
        part = layer.parts[name, 0][0].key
        if weights.has_codes(part, self._bits):
            return "codes"
        return "grid" if weights.has_grid(part, self._bits) else ""

    def _is_balanced(self, layer: ExpertLayer) -> bool:
        rounds = self._fitted and self._bits < 16 and not self._own_groups(layer)
        return rounds and layer.linear_in_up

    def _own_groups(self, layer: ExpertLayer) -> dict[str, int]:
        return {name: gguf.GROUP for name in layer.params if self._own_grid(layer, name)}

    def _parameter(self, layer: ExpertLayer, name: str, expert: int) -> Tensor:
        tensors = []
        for part in layer.parts[name, expert]:
            tensor = self._weights.load(part.key, expert if part.is_fused else None)
            tensors.append(part.arranged(tensor))
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 0)
        return joined.mT if layer.transposed and joined.dim() == 2 else joined


def record_layout(
    layer: ExpertLayer,
    group: int,
    bits: int,
    dtype: str,
    own_groups: Mapping[str, int] | None = None,
) -> RecordLayout:
    """Lay out one expert of a layer; matrices as [out, in] whatever the model's orientation.

    Args:
        group: preferred quantization group, of no effect where values are kept.
        bits, dtype: as in `RecordLayout`.
        own_groups: parameter name -> group of the grid that it keeps, if it has one.
    Raises:
        ModelError: no group size divides a matrix's inputs.
    """
    matrices, biases = [], []
    for name, (_, *shape) in layer.params.items():
        if len(shape) == 1:
            biases.append(BiasSpec(name, shape[0]))
            continue
        rows, cols = reversed(shape) if layer.transposed else shape
        wanted = (own_groups or {}).get(name, group)
        chosen = 0 if dtype else choose_group(f"{layer.path}.{name}", cols, wanted)
        matrices.append(MatrixSpec(name, rows, cols, chosen))
    return RecordLayout(tuple(matrices), tuple(biases), bits, dtype)


def _check_config(folder: Path) -> tuple[str, object]:
    """Check the untrusted config before transformers sees it; return family and packing."""
    if is_store(folder):
        raise ModelError(f"{folder}: is already a store")
    fields = read_json(folder / "config.json")
    check_counts(folder / "config.json", fields)
    packing = None
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        packing = part.get("quantization_config") if packing is None else packing
    family = fields.get("model_type")
    if not isinstance(family, str):
        raise ModelError(f"{folder / 'config.json'}: model_type is {family!r:.80}")
    return family, packing


def _digest(path: Path) -> str:
    return hashlib.blake2b(read_small(path), digest_size=16).hexdigest()
