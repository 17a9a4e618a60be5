"""Which programs can be measured beside Fate?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fate_moe.bench.rivals.fate import Fate
from fate_moe.bench.rivals.llama_bench import IkLlamaCpp, LlamaCpp, open_llama_bench
from fate_moe.bench.rivals.rival import Rival


@dataclass(frozen=True, slots=True)
class Entry:
    """One program: the option that names its binary, and how it is opened with a GGUF."""

    option: str
    open: Callable[[Path, Path], Rival]


RIVALS: Mapping[str, Entry] = {
    "llama.cpp": Entry(
        "--llama-bench",
        lambda path, gguf: LlamaCpp(*open_llama_bench(path, "--llama-bench"), gguf),
    ),
    "ik_llama.cpp": Entry(
        "--ik-llama-bench",
        lambda path, gguf: IkLlamaCpp(*open_llama_bench(path, "--ik-llama-bench"), gguf),
    ),
}


def open_rivals(store: Path, gguf: Path, binaries: Mapping[str, Path | None]) -> list[Rival]:
    """Return Fate, and every program of the table whose binary is given.

    Raises:
        ConfigError: a binary is missing, or another program.
    """
    given = [(RIVALS[name], path) for name, path in binaries.items() if path is not None]
    return [Fate(store), *(entry.open(path, gguf) for entry, path in given)]
