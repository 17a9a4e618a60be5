"""How are llama.cpp and its fork ik_llama.cpp run, and what does their llama-bench say?

Both read the same GGUF with a tool of one name whose options have drifted apart: what a build
takes is read from its help. Random tokens in both stages, as in Fate's worker.
Source: llama.cpp 0c1e57098, tools/llama-bench.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fate_moe.bench.rivals.rival import Cell, Reading, Setting
from fate_moe.errors import ConfigError

_HELP_SECONDS = 30


def open_llama_bench(path: Path, option: str) -> tuple[Path, str]:
    """Check that a llama-bench runs; return its path and help.

    Args:
        option: the command-line option that named it, for messages.
    Raises:
        ConfigError: there is no such program, or it is another one.
    """
    found = path.expanduser().absolute()
    if not found.is_file():
        raise ConfigError(f"{option}: {path}: no such file; give the path of a llama-bench")
    try:
        done = subprocess.run(
            [str(found), "--help"], capture_output=True, text=True, timeout=_HELP_SECONDS,
            check=False, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{option}: {path}: cannot be run: {error}") from error
    text = done.stdout + done.stderr
    if "--n-gen" not in text:
        raise ConfigError(f"{option}: {path}: is no llama-bench: its --help has no --n-gen")
    return found, text


def read_llama_bench(name: str, stdout: str) -> Reading:
    """Read the JSON of a llama-bench that was asked for one test.

    Raises:
        ConfigError: it is something else.
    """
    try:
        start = stdout.index("[\n")
        (test,) = json.JSONDecoder().raw_decode(stdout, start)[0]
        tokens = int(test["n_prompt"]) + int(test["n_gen"])
        samples = [int(ns) for ns in test["samples_ns"]]
        rate = tokens / (samples[-1] / 1e9)
        build = str(test.get("build_commit", ""))
    except (ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{name}: printed no result: {stdout[-200:]!r}") from error
    return Reading(rate, {"samples_s": [ns / 1e9 for ns in samples], "build": build})


@dataclass(frozen=True, slots=True)
class _LlamaBench:
    path: Path
    help_text: str
    gguf: Path

    @property
    def is_mapping(self) -> bool:
        """Both map the GGUF under a limit."""
        return True

    @property
    def files(self) -> Sequence[Path]:
        """The GGUF."""
        return [self.gguf]

    def _has(self, flag: str) -> bool:
        return flag in self.help_text

    def _setting(self, name: str, cell: Cell, *flags: str) -> Setting:
        tokens = str(cell.tokens)
        prompt, written = (tokens, "0") if cell.stage == "prefill" else ("0", tokens)
        command = (
            str(self.path), "-m", str(self.gguf), "-o", "json", "-t", str(cell.threads),
            "-r", str(cell.passes), "-p", prompt, "-n", written, *flags,
        )  # fmt: skip
        return Setting(name, command)


@dataclass(frozen=True, slots=True)
class LlamaCpp(_LlamaBench):
    """llama.cpp: weights repacked for the processor where memory allows, else mapped."""

    name: str = "llama.cpp"

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        """Return settings; see `Rival`."""
        warm = ("--no-warmup",) if self._has("--no-warmup") else ()
        mapped = ("--load-mode", "mmap") if self._has("--load-mode") else ("-mmp", "1")
        plain = ("--repack", "0") if self._has("--repack") else ()
        as_file = self._setting("mmap", cell, *warm, *mapped, *plain)
        if cell.limit_bytes is not None:
            return [as_file]
        best = self._setting("repack", cell, *warm)
        return [best, as_file] if thorough else [best]

    def read(self, stdout: str) -> Reading:
        """Read the result; see `Rival`."""
        return read_llama_bench(self.name, stdout)


@dataclass(frozen=True, slots=True)
class IkLlamaCpp(_LlamaBench):
    """ik_llama.cpp: the same with its own kernels, and options for experts on disk."""

    name: str = "ik_llama.cpp"

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        """Return settings; see `Rival`."""
        warm = ("-w", "0") if self._has("--warmup") else ()
        as_file = self._setting("mmap", cell, *warm, "-mmp", "1")
        if cell.limit_bytes is None:
            best = self._setting("rtr", cell, *warm, "-rtr", "1")
            return [best, as_file] if thorough else [best]
        own = [
            self._setting(flag.strip("-"), cell, *warm, "-mmp", "1", flag)
            for flag in ("--prefetch-experts", "--defer-experts")
            if self._has(flag)
        ]
        return [as_file, *own] if thorough else [as_file]

    def read(self, stdout: str) -> Reading:
        """Read the result; see `Rival`."""
        return read_llama_bench(self.name, stdout)
