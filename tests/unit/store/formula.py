"""A source of records that are bytes from a formula, so that store tests need no model."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from fate_moe.store.convert import SourceLayer, SourceTensor
from fate_moe.store.format import Source
from fate_moe.types import ExpertKey


class FormulaSource:
    """Two layers of three experts and two resident tensors; counts and can fail."""

    dtype = "bfloat16"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = Source("tiny/model", None, {"config.json": "0" * 32})
        self.quantization: dict[str, object] = {"bits": 4, "group": 64}
        self.layers = tuple(
            SourceLayer(
                path=f"model.layers.{i}.mlp.experts",
                num_experts=3,
                record_bytes=4096 * (i + 1),
                head_bytes=2112,
                transposed=False,
                params={"down_proj": (3, 8, 64)},
                layout={"any": ["json", 1]},
            )
            for i in range(2)
        )
        self.resident = (
            SourceTensor("norm.weight", "F32", (3,)),
            SourceTensor("embed.weight", "BF16", (5, 7)),
        )
        self.encoded: list[ExpertKey] = []
        self.fail_at: dict[ExpertKey, BaseException] = {}

    def record(self, key: ExpertKey) -> memoryview:
        if key in self.fail_at:
            raise self.fail_at[key]
        self.encoded.append(key)
        return memoryview(formula(key, self.layers[key.layer].record_bytes))

    def read_resident(self, name: str) -> Iterator[bytes]:
        size = {"norm.weight": 12, "embed.weight": 70}[name]
        data = hashlib.shake_128(name.encode()).digest(size)
        yield data[:5]
        yield data[5:]

    def small_file(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def formula(key: ExpertKey, size: int) -> bytes:
    """The record of `key` in a FormulaSource."""
    return hashlib.shake_128(str(key).encode()).digest(size)
