"""`fate models`: which families run, as tested."""

from __future__ import annotations

from dataclasses import asdict

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.terminal import emit_json, guarded, show_table, stdout, tell

WIDE = 110  # columns


@app.command()
@guarded
def models(json_out: options.JsonOut = False) -> None:
    """List the model families and how they were tested.

    exact: output equal to plain transformers, bit for bit. guessed by: whom the predictor asks for
    the next layer's experts.

    Examples:

        fate models

        fate models --json
    """
    from fate_moe.models.families import read_families

    table = read_families()
    if json_out:
        emit_json({"transformers": table.versions, "families": [asdict(f) for f in table.families]})
        return
    # A narrow terminal has room for one version beside the notes.
    versions = (
        table.versions if stdout.width >= WIDE or not stdout.is_terminal else table.versions[-1:]
    )
    rows = [
        (
            family.model_type,
            *(family.status.get(version, "") for version in versions),
            family.predictor or "",
            family.note,
        )
        for family in table.families
    ]
    show_table(("model type", *versions, "guessed by", "note"), rows)
    newest = table.versions[-1]
    exact = sum(family.status.get(newest) == "exact" for family in table.families)
    tell(f"{exact} model types are exact with transformers {newest}", console=stdout)
