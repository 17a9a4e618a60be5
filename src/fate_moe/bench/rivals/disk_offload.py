"""How is transformers run with accelerate's disk offload, as people do without Fate?

On a plain checkpoint that the user has, in its own dtype: what does not fit into memory is read
from disk whenever a layer needs it. Run as `python -m fate_moe.bench.rivals.disk_offload JOB`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_moe.bench.rivals.rival import Cell, Reading, Setting
from fate_moe.errors import ConfigError

_MODULE = "fate_moe.bench.rivals.disk_offload"
_LIBRARY = "accelerate"
_WEIGHTS_SHARE = 0.6  # of the limit; the rest is for the process and the layer that is read
_FREE_SHARE = 0.8  # of what is available, without a limit


def open_checkpoint_folder(folder: Path) -> Path:
    """Check that a folder holds a checkpoint, and that accelerate is there.

    Raises:
        ConfigError: one of them is missing.
    """
    found = folder.expanduser().absolute()
    if not (found / "config.json").is_file():
        raise ConfigError(
            f"--transformers-checkpoint: {folder}: no config.json there; give a folder with a "
            "checkpoint in safetensors"
        )
    if importlib.util.find_spec(_LIBRARY) is None:
        raise ConfigError(
            "--transformers-checkpoint: disk offload needs accelerate; try pip install accelerate"
        )
    return found


@dataclass(frozen=True, slots=True)
class DiskOffload:
    """transformers with accelerate, in a process of its own."""

    folder: Path
    name: str = "transformers"
    is_mapping: bool = True

    @property
    def files(self) -> Sequence[Path]:
        """The checkpoint's weights."""
        return sorted(self.folder.glob("*.safetensors"))

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        """Return the one setting; see `Rival`."""
        job = {
            "folder": str(self.folder), "stage": cell.stage, "tokens": cell.tokens,
            "passes": cell.passes, "threads": cell.threads, "limit_bytes": cell.limit_bytes,
        }  # fmt: skip
        command = (sys.executable, "-m", _MODULE, json.dumps(job))
        return [Setting("disk offload", command)]

    def read(self, stdout: str) -> Reading:
        """Read the worker's line; see `Rival`."""
        try:
            fields = json.loads(stdout.strip().splitlines()[-1])
            return Reading(float(fields["tok_s"]), fields)
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.name}: printed no result: {stdout[-200:]!r}") from error


def measure(job: dict[str, Any]) -> dict[str, object]:
    """Load the checkpoint and run the job; its keys are `Cell`'s, and the folder."""
    import torch

    from fate_moe.bench.passes import time_pass

    torch.set_num_threads(job["threads"])
    ids = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=Path(job["folder"]).parent) as scratch:
        model = _load(job, scratch)
        totals = [
            sum(time_pass(model, job["stage"], job["tokens"], ids)) for _ in range(job["passes"])
        ]
        places = getattr(model, "hf_device_map", {})
        return {
            "tok_s": job["tokens"] / totals[-1],
            "passes_s": totals,
            "on_disk": sum(place == "disk" for place in places.values()),
            "modules": len(places),
        }


def _load(job: dict[str, Any], scratch: str) -> Any:
    from transformers import AutoModelForCausalLM

    from fate_moe.models.load import quiet_transformers
    from fate_moe.telemetry import system_available_bytes

    limit = job["limit_bytes"]
    room = int(_WEIGHTS_SHARE * limit if limit else _FREE_SHARE * system_available_bytes())
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            job["folder"], dtype="auto", device_map="auto", max_memory={"cpu": room},
            offload_folder=scratch, local_files_only=True, trust_remote_code=False,
            use_safetensors=True,
        ).eval()  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
