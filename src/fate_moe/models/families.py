"""Which families run, as tested, and which are refused?

Reads the table that `scripts/check_families.py` writes from its results. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from fate_moe.errors import FormatError

REFUSED = {
    "diffusion_gemma": "it generates by denoising, with experts that two stacks share",
    "inkling_mm_model": "its image tower needs scipy; its text part alone is inkling_text",
    "qwen3_omni_moe": "it is several models; the one that answers is qwen3_omni_moe_thinker",
}
"""Model types on transformers' experts interface that Fate does not run, and why."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model type of transformers with routed experts.

    Attributes:
        model_type: as in config.json.
        status: version of transformers -> "exact", "unsupported" or "fails"; absent where that
            version does not have it.
        predictor: "cross_layer", "history" or "both": whom the predictor `cross_layer` asks; None
            where it does not run.
        note: why it does not run, or "".
    """

    model_type: str
    status: Mapping[str, str]
    predictor: str | None
    note: str


@dataclass(frozen=True, slots=True)
class Families:
    """The table: `versions` of transformers, oldest first, and the families by name."""

    versions: tuple[str, ...]
    families: tuple[Family, ...]


def read_families() -> Families:
    """Read the table that is shipped.

    Raises:
        FormatError: the installation is damaged.
    """
    try:
        text = files("fate_moe.models").joinpath("families.json").read_text(encoding="utf-8")
        table = json.loads(text)
        rows = table["families"].items()
        return Families(
            tuple(table["versions"]),
            tuple(Family(name, row["status"], row["predictor"], row["note"]) for name, row in rows),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"families.json: unreadable ({error}); reinstall fate-moe") from error
