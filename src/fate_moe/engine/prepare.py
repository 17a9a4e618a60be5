"""Which store belongs to the name a user typed?

A name is `smolmoe` (built here), a store, a folder with a checkpoint, a GGUF file, or a hub id.
Whatever is not a store yet is converted once into the cache folder; the second time costs nothing.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fate_moe.engine.hub import commit_of, download
from fate_moe.errors import ConfigError, ModelError
from fate_moe.models.checkpoint import open_checkpoint
from fate_moe.models.gguf import SUFFIX, find_gguf
from fate_moe.models.records import RESIDENT_BITS, resident_bits
from fate_moe.models.resident import ResidentRecords
from fate_moe.reference import FITTED_PATH, SMOLMOE, build_smolmoe
from fate_moe.reference.recipe import HIDDEN_SIZE
from fate_moe.store.convert import ExpertSource, convert, is_made_from
from fate_moe.store.fitted import read_maps, write_fitted
from fate_moe.store.format import Manifest, is_store, read_manifest
from fate_moe.store.ordered import check_jobs
from fate_moe.types import Progress, no_progress

DEFAULT_GROUP = 64
DEFAULT_BITS = 4
DEFAULT_RESIDENT = 16
BITS = (4, 8, 16)
_LIKE_SETTINGS = re.compile(r"@(4|8|16)bit(-minmax)?(-resident[48])?$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def default_cache_dir() -> Path:
    """Return where models and stores are kept unless the caller says otherwise."""
    try:
        return Path.home() / ".cache" / "fate"
    except RuntimeError as error:
        raise ConfigError("cache folder: you have no home folder; name one") from error


def find_store(
    model: str,
    *,
    cache_dir: Path,
    revision: str | None = None,
    bits: int | None = None,
    fitted: bool = True,
    resident: int | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Return the store of a model, making it first where there is none.

    Args:
        model: `smolmoe`, a folder (store or checkpoint), a GGUF file, or a hub id such as
            `Qwen/Qwen3-30B-A3B`.
        cache_dir: where downloads and stores are kept.
        revision: commit, branch or tag of a hub id.
        bits, fitted, resident: as in `convert_model`; a store must hold what was asked for. None: a
            store as it is, and 4 and 16 bits where one is made.
    Raises:
        ModelError: nothing by that name, nothing that can be converted, or a store of other bits.
        ConfigError: bits or scales that do not exist.
        StoreError: the store cannot be written.
    """
    folder = _local(model)
    if folder is not None and is_store(folder):
        if bits is not None or not fitted:
            _check_experts(folder, _settings(bits or DEFAULT_BITS, fitted))
        if resident is not None:
            _check_rest(folder, resident)
        return folder
    store, _ = convert_model(
        model, None, cache_dir=cache_dir, revision=revision, bits=bits or DEFAULT_BITS,
        fitted=fitted, resident=DEFAULT_RESIDENT if resident is None else resident,
        progress=progress,
    )  # fmt: skip
    return store


def convert_model(  # noqa: PLR0913 - a store's options, all of them by name
    model: str,
    out: Path | None,
    *,
    cache_dir: Path,
    revision: str | None = None,
    group_size: int = DEFAULT_GROUP,
    bits: int = DEFAULT_BITS,
    fitted: bool = True,
    resident: int = DEFAULT_RESIDENT,
    force: bool = False,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Path, Manifest]:
    """Make the store of a model, or find that it is there already.

    Args:
        out: where to; None = its place in the cache folder, where a store of other content (the
            checkpoint changed) is replaced.
        group_size: weights that share a scale and a zero.
        bits: per weight: 4, 8, or 16 for experts as they are in the checkpoint.
        fitted: scales of the least error; if not, plain min-max.
        resident: bits of the large matrices besides the experts': 4, 8, or 16 for as they are.
        force: convert again and replace what is at `out`.
        jobs: experts to convert side by side; None = one per core, together within 1 GiB.
    Returns:
        The store's folder and manifest.
    Raises:
        ConfigError: bits or scales that do not exist, or a number of jobs that cannot be.
        ModelError, StoreError: as `find_store`.
    """
    # First: a typing error should not cost a download.
    _settings(bits, fitted, resident)
    check_jobs(jobs)
    folder = _local(model)
    if folder is not None and is_store(folder):
        raise ModelError(f"{model}: is a store already; give the checkpoint it was made from")
    checkpoint = find_checkpoint(model, cache_dir=cache_dir, revision=revision, progress=progress)
    store = out or cached_store(
        model, cache_dir, revision, bits=bits, fitted=fitted, resident=resident
    )
    commit = commit_of(checkpoint) or revision
    with open_checkpoint(
        checkpoint, group=group_size, bits=bits, fitted=fitted, source_id=model, revision=commit
    ) as checkpoint_source:
        source: ExpertSource = checkpoint_source
        if resident != 16:
            source = ResidentRecords(checkpoint_source, resident, fitted=fitted, jobs=jobs)
        stale = out is None and is_store(store) and not is_made_from(read_manifest(store), source)
        with _one_thread():
            manifest = convert(
                source, store, force=force or stale, wait=out is None, jobs=jobs,
                progress=progress,
            )  # fmt: skip
    if model == SMOLMOE and manifest.fitted is None:
        maps = read_maps(FITTED_PATH, manifest, HIDDEN_SIZE)
        manifest = write_fitted(store, manifest, maps)
    give_memory_back()
    return store, manifest


def cached_store(
    model: str,
    cache_dir: Path,
    revision: str | None = None,
    *,
    bits: int = DEFAULT_BITS,
    fitted: bool = True,
    resident: int = DEFAULT_RESIDENT,
) -> Path:
    """Return where the store of a model lies in the cache folder, made or not."""
    settings = _settings(bits, fitted, resident)
    folder = _local(model)
    whole = model if revision is None else f"{model}@{revision}"
    name = re.sub(r"[^A-Za-z0-9.@_-]+", "--", whole).strip("-.")[-80:] or "model"
    # Two models must not share a store: folders of one name, or ids that become one name.
    if folder is not None:
        name += "-" + _short_digest(bytes(folder.resolve()))
    elif name.replace("--", "/") != whole or _LIKE_SETTINGS.search(whole):
        name += "-" + _short_digest(whole.encode(errors="surrogatepass"))
    if settings != _settings(DEFAULT_BITS, fitted=True):
        name += f"@{settings}"
    return cache_dir / "stores" / name


def known_store(model: str, cache_dir: Path) -> Path | None:
    """Return a store that exists already, or None.

    Args:
        model: the store's folder, or a model whose store has the default settings.
    """
    for folder in (_local(model), cached_store(model, cache_dir)):
        if folder is not None and is_store(folder):
            return folder
    return None


def find_checkpoint(
    model: str,
    *,
    cache_dir: Path,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Return where a model's original weights lie, fetching or building them where needed.

    Returns:
        A folder, or a GGUF file.
    Raises:
        ModelError: nothing by that name.
    """
    folder = _local(model)
    if folder is not None:
        if folder.is_file() or (folder / "config.json").is_file():
            return folder
        found = find_gguf(folder)
        if found is None:
            raise ModelError(
                f"{model}: the folder holds neither config.json nor fate.json nor a GGUF"
            )
        return found
    if model == SMOLMOE:
        return build_smolmoe(cache_dir, progress)
    if model.lower().endswith(SUFFIX):
        raise ModelError(f"{model}: no such file")
    if _HUB_ID.fullmatch(model) and not is_file(model):
        return download(model, revision, progress)
    raise no_model(model)


def no_model(model: str) -> ModelError:
    """Return the error that says why a name leads to no model, and which names do."""
    why = "is a file" if is_file(model) else "no such folder"
    return ModelError(
        f"{model}: {why}; give {SMOLMOE}, a folder with a checkpoint or a store, a GGUF file, or a "
        "hub id (owner/name)"
    )


def is_file(model: str) -> bool:
    """Return whether a name is that of a file on this machine."""
    try:
        return Path(model).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # as in `_local`
        return False


def _short_digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def _settings(bits: int, fitted: bool, resident: int = DEFAULT_RESIDENT) -> str:
    """Name a choice of bits and scales: 4bit, 8bit-minmax, 16bit, 4bit-resident8."""
    if bits not in BITS:
        raise ConfigError(f"bits: {bits} is none of {', '.join(map(str, BITS))}")
    if not fitted and bits == 16:
        raise ConfigError("scales: minmax needs 4 or 8 bits, have 16, which keep no scales")
    if resident not in RESIDENT_BITS:
        raise ConfigError(f"resident: {resident} is none of {', '.join(map(str, RESIDENT_BITS))}")
    rest = "" if resident == DEFAULT_RESIDENT else f"-resident{resident}"
    return f"{bits}bit" + ("" if fitted else "-minmax") + rest


def _check_experts(folder: Path, need: str) -> None:
    manifest = read_manifest(folder)
    bits = 16 if manifest.quantization["bits"] == 32 else manifest.quantization["bits"]
    have = f"{bits}bit" + ("-minmax" if manifest.quantization.get("scales") == "minmax" else "")
    if have != need:
        raise ModelError(
            f"{folder}: the store holds {have} experts, need {need}; give the checkpoint it was "
            f"made from ({manifest.source.id})"
        )


def _check_rest(folder: Path, need: int) -> None:
    manifest = read_manifest(folder)
    have = resident_bits(manifest)
    if have != need:
        raise ModelError(
            f"{folder}: the store holds {have} bits of what is no expert, need {need}; give the "
            f"checkpoint it was made from ({manifest.source.id})"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    # Quantizing is many small operations; a second thread inside one gains little and, beside one
    # busy process, costs several times the time (docs/experiments.md). Whole experts side by side
    # are another matter: `convert` has its own threads, which take this number over.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _local(model: str) -> Path | None:
    """Return the folder or the GGUF file that a name leads to, or None."""
    try:
        path = Path(model).expanduser()
        is_gguf = path.suffix.lower() == SUFFIX and path.is_file()
        return path if is_gguf or path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, unknown user, null byte
        return None


def give_memory_back() -> None:
    """Collect what is unreachable and return free memory to the system, where that can be done."""
    # Building and converting leave the C library with free memory that counts as ours: hundreds of
    # MiB that the plan of the run that follows would have to pay for.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)
