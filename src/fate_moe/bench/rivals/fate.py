"""How is Fate itself run, as one rival of others?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fate_moe import native
from fate_moe.bench.rivals.rival import Cell, Reading, Setting
from fate_moe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fate:
    """Runs `bench/worker.py` on a store."""

    store: Path
    name: str = "fate"
    is_mapping: bool = False

    @property
    def files(self) -> Sequence[Path]:
        """Every file of the store."""
        return sorted(self.store.glob("*.safetensors"))

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        """Return the one setting: everything resident without a limit, else the default policy."""
        job = {
            "store": str(self.store), "stage": cell.stage, "tokens": cell.tokens,
            "passes": cell.passes, "threads": cell.threads,
            "is_limited": cell.limit_bytes is not None,
            "instructions": native.core().isa() if native.is_available() else "",
        }  # fmt: skip
        command = (sys.executable, "-m", "fate_moe.bench.worker", json.dumps(job))
        return [Setting("default", command)]

    def read(self, stdout: str) -> Reading:
        """Read the worker's line.

        Raises:
            ConfigError: it is none.
        """
        try:
            fields = json.loads(stdout.strip().splitlines()[-1])
            return Reading(float(fields["tok_s"]), fields)
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"fate: printed no result: {stdout[-200:]!r}") from error
