"""What is in a store, and is this manifest one we can trust?

    fate.json                    this manifest, written last
    config.json, tokenizer, ...  copied from the source
    resident.safetensors         everything that is not a routed expert
    experts-LLLLL.safetensors    per MoE layer one uint8 tensor `experts.{e}` per expert, at
                                 `first_offset + e * record_bytes`, both multiples of 4096

The manifest is untrusted input: every count and size is bounded, every path is a plain file name
in the folder, unknown fields are errors. Invariant: a `Manifest` that parsed is consistent in
itself; `reader` and `verify` compare it with the files. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fate_moe.errors import FormatError, StoreError
from fate_moe.store.fields import Fields
from fate_moe.store.header import PAGE, build_header, load_json
from fate_moe.types import ExpertKey

VERSION = 1
MANIFEST_FILE = "fate.json"
RESIDENT_FILE = "resident.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_MANIFEST_BYTES = 1 << 28
MAX_LAYERS = 4096
MAX_EXPERTS = 1 << 16
MAX_RECORDS = 1 << 21
MAX_RECORD_BYTES = 1 << 34
MAX_FILE_BYTES = 1 << 50
DTYPES = ("bfloat16", "float16", "float32")
BITS = (4, 8, 16, 32)
FATES = ("kept", "requantized", "dequantized")  # of a source's packed weights
MAX_PACKINGS = 32
CHECKSUM = re.compile(r"[0-9a-f]{32}")  # blake2b, 128 bits


def layer_file(layer: int) -> str:
    """Name the file of MoE layer `layer`."""
    return f"experts-{layer:05d}.safetensors"


def record_name(expert: int) -> str:
    """Name the tensor that is the record of `expert` in its layer's file."""
    return f"experts.{expert}"


def layer_header(num_experts: int, record_bytes: int) -> bytes:
    """Build the header of a layer file; its length is `first_offset`."""
    shape = (record_bytes,)
    return build_header([(record_name(e), "U8", shape) for e in range(num_experts)])


@dataclass(frozen=True, slots=True)
class Source:
    """What a store was made from.

    Attributes:
        id: hub id or folder name.
        revision: commit of the hub repository, if known.
        files: file name -> blake2b-128 (config: content; shards: header, size, time of writing).
    """

    id: str
    revision: str | None
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """The experts of one MoE layer.

    Attributes:
        path: module path in the model, such as "model.layers.0.mlp.experts".
        file: file name in the store.
        num_experts: E.
        record_bytes: bytes of one record, a multiple of 4096.
        head_bytes: the INT2 expert is record[:head_bytes]; without one, all that is no padding.
        first_offset: byte offset of expert 0 in the file, a multiple of 4096.
        transposed: the model keeps its matrices as [in, out]; the record always has [out, in].
        params: parameter name -> shape in the model's experts module, first size E.
        layout: the record layout, JSON that only `quant` reads.
        checksums: blake2b-128 per record, in hex.
    """

    path: str
    file: str
    num_experts: int
    record_bytes: int
    head_bytes: int
    first_offset: int
    transposed: bool
    params: Mapping[str, tuple[int, ...]]
    layout: Mapping[str, object]
    checksums: tuple[str, ...]

    def offset(self, expert: int) -> int:
        """Byte offset of the record of `expert` in the layer's file."""
        return self.first_offset + expert * self.record_bytes

    @property
    def file_bytes(self) -> int:
        """Size that the layer's file must have."""
        return self.offset(self.num_experts)

    @property
    def head_read_bytes(self) -> int:
        """`head_bytes` rounded up to 4096: what an O_DIRECT read of the head takes."""
        return min(-(-self.head_bytes // PAGE) * PAGE, self.record_bytes)


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file that is read as a whole; blake2b-128 of it."""

    file: str
    bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of fate.json.

    Attributes:
        source: what the store was made from.
        dtype: the dtype of the source's experts, such as "bfloat16".
        quantization: {"bits": 4, ...}, for people and reports; 16 and 32 are unquantized. Where
            the source's experts were packed, {"source": {"Q4_0": "kept", ...}} says what became of
            each packing: kept as it was, requantized, or dequantized.
        layers: MoE layers in model order; the index is `ExpertKey.layer`.
        resident: the rest of the model.
        fitted: what `fate calibrate` fitted, see `fitted.py`; None until then.
    """

    source: Source
    dtype: str
    quantization: Mapping[str, object]
    layers: tuple[LayerEntry, ...]
    resident: WholeFile
    fitted: WholeFile | None = None
    format: int = field(default=VERSION)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all records of all layers."""
        return sum(layer.num_experts * layer.record_bytes for layer in self.layers)

    def layer(self, key: ExpertKey, name: str = MANIFEST_FILE) -> LayerEntry:
        """Look up the layer of `key`.

        Raises:
            StoreError: the store has no such expert.
        """
        if 0 <= key.layer < len(self.layers):
            entry = self.layers[key.layer]
            if 0 <= key.expert < entry.num_experts:
                return entry
        raise StoreError(f"{name}: no {key}; the store has {len(self.layers)} MoE layers")

    def to_json(self) -> dict[str, object]:
        """Describe the manifest in JSON types; `parse_manifest` is the inverse."""
        data = asdict(self)
        if self.fitted is None:  # as stores were before there was such a thing
            del data["fitted"]
        return data


def write_manifest(manifest: Manifest) -> bytes:
    """Serialize a manifest into the bytes of fate.json."""
    return (json.dumps(manifest.to_json(), indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/fate.json.

    Raises:
        StoreError: there is no store in the folder.
        FormatError: the manifest breaks the format; names file, field and value.
    """
    path = folder / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: no store here: {error.strerror or error}") from error
    return parse_manifest(data, str(path))


def is_store(folder: Path) -> bool:
    """Tell whether `folder` holds a manifest, valid or not."""
    return (folder / MANIFEST_FILE).is_file()


def parse_manifest(data: bytes, name: str = MANIFEST_FILE) -> Manifest:
    """Parse and check the bytes of fate.json.

    Raises:
        FormatError: the manifest breaks the format; names file, field and value.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(f"{name}: larger than {MAX_MANIFEST_BYTES} bytes")
    top = Fields(load_json(data, name), name)
    version = top.integer("format", 1, 1 << 31)
    if version != VERSION:
        raise FormatError(f"{name}: format {version}, this version of Fate reads {VERSION}")
    quantization = top.fields("quantization")
    bits = quantization.integer("bits", BITS[0], BITS[-1])
    if bits not in BITS:
        raise FormatError(f"{name}: quantization: bits is {bits}, must be one of {BITS}")
    if "source" in quantization.rest():
        _check_packings(quantization.fields("source"), name)
    layers = tuple(_layer(item) for item in top.objects("layers", 1, MAX_LAYERS))
    manifest = Manifest(
        source=_source(top.fields("source")),
        dtype=top.choice("dtype", DTYPES),
        quantization=quantization.rest(),
        layers=layers,
        resident=_whole_file(top.fields("resident")),
        fitted=_whole_file(top.fields("fitted")) if "fitted" in top.rest() else None,
    )
    top.done()
    _check_whole(manifest, name)
    return manifest


def _check_packings(fields: Fields, name: str) -> None:
    for packing in fields.names(MAX_PACKINGS):
        if not packing.isprintable() or not 1 <= len(packing) <= 64:
            raise FormatError(f"{name}: quantization: {packing!r:.80} is no name of a packing")
        fields.choice(packing, FATES)


def _source(fields: Fields) -> Source:
    files = fields.fields("files")
    source = Source(
        id=fields.text("id", 1024),
        revision=fields.optional_text("revision", 256),
        files={key: files.matching(key, CHECKSUM) for key in files.names(1 << 16)},
    )
    fields.done()
    return source


def _layer(fields: Fields) -> LayerEntry:
    num_experts = fields.integer("num_experts", 1, MAX_EXPERTS)
    record_bytes = fields.integer("record_bytes", PAGE, MAX_RECORD_BYTES, multiple=PAGE)
    params = fields.fields("params")
    entry = LayerEntry(
        path=fields.matching("path", re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")),
        file=fields.file_name("file"),
        num_experts=num_experts,
        record_bytes=record_bytes,
        head_bytes=fields.integer("head_bytes", 1, record_bytes),
        first_offset=fields.integer("first_offset", PAGE, MAX_FILE_BYTES, multiple=PAGE),
        transposed=fields.boolean("transposed"),
        params={key: params.sizes(key, num_experts) for key in params.names(32)},
        layout=fields.fields("layout").rest(),
        checksums=fields.texts("checksums", num_experts, CHECKSUM),
    )
    fields.done()
    return entry


def _whole_file(fields: Fields) -> WholeFile:
    entry = WholeFile(
        file=fields.file_name("file"),
        bytes=fields.integer("bytes", 8, MAX_FILE_BYTES),
        checksum=fields.matching("checksum", CHECKSUM),
    )
    fields.done()
    return entry


def _check_whole(manifest: Manifest, name: str) -> None:
    whole = [one.file for one in (manifest.resident, manifest.fitted) if one is not None]
    files = [layer.file for layer in manifest.layers] + whole
    for what, values in (("file", files), ("path", [layer.path for layer in manifest.layers])):
        if len(set(values)) != len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise FormatError(f"{name}: {what} {twice!r} appears twice")
    records = sum(layer.num_experts for layer in manifest.layers)
    if records > MAX_RECORDS:
        raise FormatError(f"{name}: {records} records, the limit is {MAX_RECORDS}")
    for layer in manifest.layers:
        if layer.file_bytes > MAX_FILE_BYTES:
            raise FormatError(f"{name}: {layer.file} would have {layer.file_bytes} bytes")
