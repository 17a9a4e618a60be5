"""Which programs can be measured beside Fate?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fate_moe.bench.rivals.disk_offload import DiskOffload, open_checkpoint_folder
from fate_moe.bench.rivals.fate import Fate
from fate_moe.bench.rivals.llama_bench import IkLlamaCpp, LlamaCpp, open_llama_bench
from fate_moe.bench.rivals.rival import Rival


@dataclass(frozen=True, slots=True)
class Entry:
    """One program: whether it reads the GGUF, and how what the user names is opened with it."""

    reads_gguf: bool
    open: Callable[[Path, Path], Rival]


RIVALS: Mapping[str, Entry] = {
    "llama.cpp": Entry(
        True,
        lambda path, gguf: LlamaCpp(*open_llama_bench(path, "--llama-bench"), gguf),
    ),
    "ik_llama.cpp": Entry(
        True,
        lambda path, gguf: IkLlamaCpp(*open_llama_bench(path, "--ik-llama-bench"), gguf),
    ),
    "transformers": Entry(False, lambda path, gguf: DiskOffload(open_checkpoint_folder(path))),
}


def open_rivals(store: Path, gguf: Path, named: Mapping[str, Path | None]) -> list[Rival]:
    """Return Fate, and every program of the table for which the user names a path.

    Args:
        named: name in the table -> its binary or its checkpoint.
    Raises:
        ConfigError: there is nothing of use.
    """
    given = [(RIVALS[name], path) for name, path in named.items() if path is not None]
    return [Fate(store), *(entry.open(path, gguf) for entry, path in given)]
