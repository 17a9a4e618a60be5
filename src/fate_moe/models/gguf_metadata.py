"""What do the metadata of a GGUF say, checked as they are asked for?

The header is read as it lies there (`gguf_header`); here a key is a count, a number or a shape, or
an error that names it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_header import GgufHeader, GgufTensor

EMBEDDING, OUTPUT, ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Gguf:
    """What all files of a model say together.

    Attributes:
        header: of the first file, which has the metadata.
        tensors: name -> tensor, of all files.
        digests: file name -> fingerprint.
    """

    header: GgufHeader
    tensors: Mapping[str, GgufTensor]
    digests: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The first file, for messages."""
        return self.header.path

    @property
    def architecture(self) -> str:
        """The model's kind in llama.cpp's words, such as "qwen3moe"."""
        value = self.header.metadata.get("general.architecture")
        if not isinstance(value, str) or not value.isprintable():
            raise FormatError(f"{self.path}: general.architecture is {value!r:.80}")
        return value

    def find(self, key: str) -> object:
        """Return the metadata of the architecture's `key`, or None."""
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a count from the metadata; at least 1, or 0 if that is the default.

        Raises:
            ModelError: it is missing and has no default.
            FormatError: it is no count.
        """
        value = self.find(key)
        if value is None and default is not None:
            return default
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]  # one per layer, all alike
        least = 0 if default == 0 else 1
        if type(value) is not int or not least <= value < 1 << 31:
            raise self._wrong(key, value, "a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number from the metadata, the shortest that is the same in float32."""
        value = self.find(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise self._wrong(key, value, "a number")
        return shortest(float(value))  # type: ignore[arg-type]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            ModelError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name].shape

    def any_shape(self, ending: str) -> tuple[int, ...]:
        """Return the shape of the first layer's tensor with this ending that has one."""
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and name.endswith(f".{ending}"):
                return tensor.shape
        raise ModelError(f"{self.path}: no layer has a tensor {ending}")

    def _wrong(self, key: str, value: object, need: str) -> ModelError | FormatError:
        name = f"{self.architecture}.{key}"
        if value is None:
            return ModelError(f"{self.path}: metadata lacks {name}")
        return FormatError(f"{self.path}: {name} is {value!r:.80}, must be {need}")


def shortest(value: float) -> float:
    """Return the shortest number that is the same in float32.

    Metadata are float32: 1e-06 was written, 9.999999974752427e-07 is read.
    """
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
