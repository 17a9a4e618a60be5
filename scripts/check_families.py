"""Which families run exactly, in which versions of transformers?

    python scripts/check_families.py                     # all supported versions: minutes each
    python scripts/check_families.py --versions 5.23.0   # one of them; the others' results stay

Runs tests/families for every model type of each version, installed aside into build/, and writes
what `fate models` shows (src/fate_moe/models/families.json) and docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src/fate_moe/models/families.json"
PAGE = ROOT / "docs/families.md"
OUTSIDE = "outside of transformers' experts interface"
VERSIONS = ("5.14.0", "5.18.0", "5.23.0")  # the oldest supported one, one between, the newest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where they are put")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # the child's job
    return parser.parse_args()


def check_here(out: Path) -> None:
    """Check every family of the transformers that this process imports; write the results."""
    import transformers

    from fate_moe.models.families import REFUSED
    from tests.families.exact import check_family, model_types

    rows: dict[str, dict[str, Any]] = {}
    for model_type in model_types():
        if model_type in REFUSED:
            rows[model_type] = {"status": "unsupported", "note": REFUSED[model_type]}
            continue
        try:
            with tempfile.TemporaryDirectory() as work:
                outcome = check_family(model_type, Path(work))
            rows[model_type] = {"status": "exact", **outcome.to_json()}
        except Exception as error:  # noqa: BLE001 - a row of the table, whatever it was
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows[model_type] = {"status": "fails", "note": first[:200]}
            traceback.print_exc()
        print(f"{model_type}: {rows[model_type]['status']}", flush=True)
    for model_type in model_types(decorated=False):
        rows[model_type] = {"status": "unsupported", "note": OUTSIDE}
    out.write_text(json.dumps({"version": transformers.__version__, "rows": rows}))


def check_version(version: str, build: Path) -> dict[str, Any]:
    """Install one version aside, check it in a process of its own, return its rows."""
    place = build / f"transformers-{version}"
    if not place.is_dir():
        fresh = build / f"transformers-{version}.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", fresh,
             f"transformers=={version}"], check=True,
        )  # fmt: skip
        fresh.rename(place)
    out = place / "families.json"
    path = os.pathsep.join(map(str, (place, ROOT / "src", ROOT)))
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--here", out], check=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text())
    if found["version"] != version:
        raise SystemExit(f"wanted transformers {version}, checked {found['version']}")
    rows: dict[str, Any] = found["rows"]
    return rows


def merged(table: Mapping[str, Any], version: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Put one version's rows into the table; the newest version that has a family describes it."""
    versions = sorted({*table["versions"], version}, key=Version)
    families = {name: {**row, "status": dict(row["status"])}
                for name, row in table["families"].items()}  # fmt: skip
    for row in families.values():
        row["status"].pop(version, None)
    for name, row in rows.items():
        kept = families.setdefault(name, {"predictor": None, "note": "", "status": {}})
        kept["status"][version] = row["status"]
        if max(kept["status"], key=versions.index) == version:
            kept |= {"predictor": row.get("predictor"), "note": row.get("note", "")}
    families = {name: row for name, row in sorted(families.items()) if row["status"]}
    return {"versions": versions, "families": families}


def page(table: Mapping[str, Any]) -> str:
    """Write the table as a page."""
    versions, families = table["versions"], table["families"]
    newest = versions[-1]
    exact = sum(row["status"].get(newest) == "exact" for row in families.values())
    lines = [
        "# Families",
        "",
        "Made by `python scripts/check_families.py`; `fate models` shows the same. All model types",
        "of transformers with routed experts, named as in `config.json`. *exact*: a random model,",
        "saved as published and converted, gives the logits and greedy answers of plain",
        "transformers bit for bit in float32 with 30 % of its experts in memory, both unquantized",
        "and in INT4 (there against transformers with the dequantized weights). *guessed by*: whom",
        "the predictor asks for the next layer's experts: its router (`cross_layer`), or what it",
        "chose before (`history`) where a router needs more than a gate input.",
        "",
        f"{exact} model types are exact with transformers {newest}.",
        "",
        f"| model type | {' | '.join(versions)} | guessed by | note |",
        f"|---|{'---|' * len(versions)}---|---|",
    ]
    for name, row in families.items():
        cells = [row["status"].get(version, "") for version in versions]
        lines.append(
            f"| `{name}` | {' | '.join(cells)} | {row['predictor'] or ''} | {row['note']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments()
    if options.here:
        check_here(options.here)
        return
    for version in options.versions:
        rows = check_version(version, options.build)
        table = {"versions": [], "families": {}}
        if TABLE.is_file():
            table = json.loads(TABLE.read_text(encoding="utf-8"))
        table = merged(table, version, rows)
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(table), encoding="utf-8")
        exact = sum(row["status"] == "exact" for row in rows.values())
        print(f"transformers {version}: {exact} of {len(rows)} model types exact")


if __name__ == "__main__":
    main()
