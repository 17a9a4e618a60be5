"""What does a checkpoint look like, whatever kind of files it lies in?

Every kind (safetensors, plain or packed, or another) hands out its tensors under the names and in
the shapes that the family publishes in safetensors, as plain floats. So the index of experts and
the conversion never learn what a file was like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fate_moe.store.convert import SourceTensor

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights(Protocol):
    """The tensors of a checkpoint. All headers are checked before one of these exists."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Name -> dtype (in safetensors' words) and shape, of what `load` and `pieces` give."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """File name -> a fingerprint that changes when the file does."""
        ...

    @property
    def packings(self) -> Mapping[str, str]:
        """Name -> what it is packed as in the file, such as "FP8"; without those that are plain."""
        ...

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """Read a float tensor, or the part `expert` of its first dimension.

        Raises:
            ModelError: the tensor holds no floats that we know.
            FormatError: a file ends too early or cannot be read.
        """
        ...

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of any dtype in pieces of at most a few MiB.

        Raises:
            FormatError: as `load`.
        """
        ...

    def where(self, name: str) -> Path:
        """Name the file that a tensor lies in, for messages."""
        ...

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        ...
