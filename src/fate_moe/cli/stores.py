"""`fate convert`, `fate inspect`, `fate verify`: making stores and looking at them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fate_moe.cli import options
from fate_moe.cli.app import app
from fate_moe.cli.terminal import (
    TerminalProgress,
    default_cache_dir,
    emit_json,
    fail,
    guarded,
    show_rows,
    stdout,
    tell,
)
from fate_moe.config import format_bytes
from fate_moe.errors import ConfigError

if TYPE_CHECKING:
    from fate_moe.store.format import Manifest

Store = Annotated[
    str,
    typer.Argument(metavar="STORE", help="A store, or a model whose store is in the cache folder."),
]


@app.command()
@guarded
def convert(
    model: options.Model = "smolmoe",
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[STORE]", help="Folder to write. Default: the cache folder."),
    ] = None,
    group_size: Annotated[
        int,
        typer.Option(metavar="N", help="Weights that share a scale and a zero: 64 or 32."),
    ] = 64,
    bits: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Per weight: 4, 8, or 16 (experts stay as they are). Other commands take a store "
            "of 8 or 16 bits by its path.",
        ),
    ] = 4,
    scales: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fitted (least error), or minmax (each group's range, the yardstick).",
        ),
    ] = "fitted",
    resident: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Bits of the large matrices besides the experts' (attention, shared experts, the "
            "vocabulary): 4, 8, or 16 (as they are).",
        ),
    ] = 16,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the store that is there, once done.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts to convert side by side. Default: one per core, within 1 GiB together.",
        ),
    ] = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Turn a checkpoint into a store, with INT4 experts unless --bits says otherwise.

    Streams expert by expert, so it needs little memory; goes on where it was interrupted; the
    store appears only when it is complete.

    Examples:

        fate convert Qwen/Qwen1.5-MoE-A2.7B-Chat

        fate convert ./my-checkpoint ./my-store --group-size 32

        fate convert ./my-checkpoint ./my-store --bits 8 --scales minmax

        fate convert ./my-checkpoint ./my-small-store --resident 4

        fate convert ./my-model-Q4_0.gguf ./my-store
    """
    if scales not in ("fitted", "minmax"):
        raise ConfigError(f"scales: {scales!r} is none of fitted, minmax")
    with TerminalProgress() as progress:
        from fate_moe.engine.prepare import convert_model

        root = cache_dir or default_cache_dir()
        store, manifest = convert_model(
            model, out, cache_dir=root, revision=revision, group_size=group_size, bits=bits,
            fitted=scales == "fitted", resident=resident, force=force, jobs=jobs, progress=progress,
        )  # fmt: skip
    if json_out:
        emit_json({"store": str(store), **_summary(manifest)})
    else:
        show_rows([("store", str(store)), *_rows(manifest)], stdout)


@app.command()
@guarded
def inspect(
    store: Store = "smolmoe",
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Show what is in a store.

    Examples:

        fate inspect

        fate inspect ./my-store --json
    """
    from fate_moe.store.format import read_manifest

    folder = _existing_store(store, cache_dir)
    manifest = read_manifest(folder)
    if json_out:
        emit_json({"store": str(folder), **_summary(manifest)})
    else:
        show_rows([("store", str(folder)), *_rows(manifest)], stdout)


@app.command()
@guarded
def verify(
    store: Store = "smolmoe",
    cache_dir: options.CacheDir = None,
    json_out: options.JsonOut = False,
) -> None:
    """Recompute every checksum of a store; exit code 2 when a byte is wrong.

    Example:

        fate verify ./my-store
    """
    from fate_moe.store import verify as checks

    folder = _existing_store(store, cache_dir)
    with TerminalProgress() as progress:
        report = checks.verify(folder, progress)
    if json_out:
        emit_json(
            {
                "store": str(folder),
                "intact": report.is_intact,
                "records": report.records,
                "bytes_read": report.bytes_read,
                "findings": [asdict(finding) for finding in report.findings],
            }
        )
    else:
        for finding in report.findings:
            tell(str(finding), console=stdout)
    if not report.is_intact:
        fail(
            f"{folder}: {len(report.findings)} of {report.records + len(report.findings)} parts "
            "damaged; convert the model again with --force",
            2,
        )
    if not json_out:
        read = format_bytes(report.bytes_read)
        tell(f"{folder}: {report.records} records intact, {read} read", console=stdout)


def _existing_store(store: str, cache_dir: Path | None) -> Path:
    from fate_moe.engine.prepare import is_file, known_store, no_model
    from fate_moe.models.gguf import SUFFIX

    folder = known_store(store, cache_dir or default_cache_dir())
    if folder is None:
        is_absent = store.startswith((".", "/", "~")) and not Path(store).expanduser().exists()
        if is_absent or (is_file(store) and not store.lower().endswith(SUFFIX)):
            raise no_model(store)
        raise ConfigError(f"{store}: no store yet; run fate convert {store}")
    return folder


def _summary(manifest: Manifest) -> dict[str, object]:
    maps = manifest.fitted
    return {
        "format": manifest.format,
        "source": asdict(manifest.source),
        "dtype": manifest.dtype,
        "quantization": dict(manifest.quantization),
        "moe_layers": len(manifest.layers),
        "experts": sum(layer.num_experts for layer in manifest.layers),
        "expert_bytes": manifest.layers[0].record_bytes,
        "experts_bytes": manifest.expert_bytes,
        "resident_bytes": manifest.resident.bytes,
        "maps": maps and {"file": maps.file, "bytes": maps.bytes},
        "layers": [
            {
                "path": layer.path,
                "num_experts": layer.num_experts,
                "record_bytes": layer.record_bytes,
                "head_bytes": layer.head_bytes,
                "layout": layer.layout,
            }
            for layer in manifest.layers
        ],
    }


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    source = manifest.source
    first = manifest.layers[0]
    counts = sorted({layer.num_experts for layer in manifest.layers})
    has_head = manifest.quantization["bits"] == 4
    head = f", of which the INT2 head {format_bytes(first.head_bytes)}" if has_head else ""
    own_rows = ("source", "resident_bits")
    choices = {name: value for name, value in manifest.quantization.items() if name not in own_rows}
    quantization = ", ".join(f"{name} {value}" for name, value in choices.items())
    packings = manifest.quantization.get("source")
    fates = packings.items() if isinstance(packings, dict) else ()
    packed = ", ".join(f"{name} {fate}" for name, fate in fates)
    return [
        ("source", source.id + (f" at {source.revision}" if source.revision else "")),
        ("quantization", f"{quantization} (source {manifest.dtype})"),
        *([("packed", packed)] if packed else []),
        ("layers", f"{len(manifest.layers)} with {' or '.join(map(str, counts))} experts each"),
        ("expert", format_bytes(first.record_bytes) + head),
        (
            "size",
            f"{format_bytes(manifest.expert_bytes)} of experts, "
            f"{format_bytes(manifest.resident.bytes)} of everything else{_rest(manifest)}",
        ),
        (
            "maps",
            f"{format_bytes(manifest.fitted.bytes)}, fitted for --predictor ridge"
            if manifest.fitted
            else "none; fate calibrate fits them for --predictor ridge",
        ),
    ]


def _rest(manifest: Manifest) -> str:
    bits = manifest.quantization.get("resident_bits", 16)
    return "" if bits == 16 else f" (large matrices in {bits} bits)"
