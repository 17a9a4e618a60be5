"""Which small files of a checkpoint come along into the store, and are they small?

By name: never code, never pickles, never other weights. Invariant: no file is read beyond
`MAX_SMALL_BYTES`. Where one is larger, a file that the model needs is an error, and any other is
left out: repositories keep training logs and samples beside their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fate_moe.errors import ModelError
from fate_moe.store.format import MANIFEST_FILE
from fate_moe.store.workdir import JOURNAL_FILE

MAX_SMALL_BYTES = 1 << 28

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NAMES = ("LICENSE", "NOTICE")
_TEMPLATE_FOLDER = "additional_chat_templates"
# How the files are called that transformers makes a config, a tokenizer or a template from.
_NEEDED_SUFFIXES = (".jinja", ".model", ".tiktoken", "config.json")
_NEEDED_STARTS = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template",
    "model.safetensors.index",
)  # fmt: skip


def small_files(folder: Path) -> list[str]:
    """Name config, tokenizer, chat template and licence files, relative to `folder`.

    Raises:
        ModelError: one that the model needs is too large, or the folder cannot be read.
    """
    try:
        top = [path for path in folder.iterdir() if path.is_file()]
        templates = [path for path in (folder / _TEMPLATE_FOLDER).glob("*.jinja") if path.is_file()]
        sizes = {path.name: path.stat().st_size for path in top if _is_copied(path.name)}
        own = {f"{_TEMPLATE_FOLDER}/{path.name}": path.stat().st_size for path in templates}
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from error
    return sorted(small_enough(sizes, str(folder))) + sorted(small_enough(own, str(folder)))


def small_enough(sizes: Mapping[str, int | None], where: str) -> list[str]:
    """Name those files that are small.

    Args:
        sizes: name -> bytes; None: nobody knows.
        where: the folder or repository that holds them, for messages.
    Raises:
        ModelError: a file that a config or a tokenizer is made from is too large.
    """
    kept = []
    for name, size in sizes.items():
        if size is not None and size <= MAX_SMALL_BYTES:
            kept.append(name)
        elif _is_needed(PurePosixPath(name).name):
            have = "unknown size" if size is None else f"{size} bytes"
            raise ModelError(
                f"{where}: {name} has {have}, need at most {MAX_SMALL_BYTES}; "
                "it is not what its name says: get the file again from a trusted place"
            )
    return kept


def read_small(path: Path) -> bytes:
    """Read a file that `small_files` names.

    Raises:
        ModelError: it cannot be read, or has grown too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SMALL_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > MAX_SMALL_BYTES:
        raise ModelError(f"{path}: larger than {MAX_SMALL_BYTES} bytes")
    return data


def _is_copied(name: str) -> bool:
    wanted = name.endswith(_SUFFIXES) or name in _NAMES
    is_ours = name.endswith(".index.json") or name in (MANIFEST_FILE, JOURNAL_FILE)
    return wanted and not is_ours


def _is_needed(name: str) -> bool:
    return name.endswith(_NEEDED_SUFFIXES) or name.startswith(_NEEDED_STARTS)


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{path}: cannot be read: {error.strerror or error}; check its permissions and its disk"
    )
