"""How does a hub id become a folder on this machine?

In two steps: first what is small, by the sizes that the hub states, so that a model that cannot be
converted costs no gigabytes; then exactly the safetensors that make it up. Never code, pickles, or
copies in other formats.
huggingface_hub does the rest: it keeps HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, takes a
lost connection up at the byte where it broke, and leaves finished files for the next call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from threading import Event, Lock
from typing import Any

from fate_moe.errors import ModelError
from fate_moe.models.checkpoint import check_config
from fate_moe.models.shards import SINGLE_FILE, promised_files
from fate_moe.store.small_files import small_enough
from fate_moe.store.space import check_space
from fate_moe.types import Progress, no_progress

DOWNLOADING = "downloading"  # what progress is told

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
# In folders lie other formats of the same weights; only chat templates are wanted from there.
_NESTED = tuple(f"*/{pattern}" for pattern in _SMALL if pattern != "*.jinja")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def download(model: str, revision: str | None, progress: Progress = no_progress) -> Path:
    """Bring a model's safetensors, config and tokenizer into huggingface_hub's cache.

    Args:
        model: hub id, such as `Qwen/Qwen3-30B-A3B`.
        revision: branch, tag or commit; None: the main branch. What it stands for now is looked
            up, unless it is a commit or the hub cannot be reached.
        progress: receives bytes fetched of bytes to fetch.
    Returns:
        The folder of one commit; `commit_of` tells which.
    Raises:
        ModelError: no such model or revision, no right to read it, no network and not here, or
            a model that cannot be converted.
        StoreError: not enough disk space.
    """
    stop = Event()
    with _readable_errors(model, revision):
        commit, published = _published(model, revision)
        if "config.json" not in published:
            raise ModelError(
                f"{model}: the repository has no config.json; "
                "only transformers checkpoints in safetensors are read"
            )
        sizes = {name: size for name, size in published.items() if name != SINGLE_FILE}
        small = tuple(map(escape, small_enough(sizes, model)))
        folder = _fetch(model, commit, small, (), _bar(no_progress, 0, stop))
        check_config(folder)
        files = promised_files(folder, published)
        need_bytes = _check_space(model, commit, files)
        bar = _bar(progress, need_bytes, stop)
        return _interruptibly(lambda: _fetch(model, commit, files, (), bar), stop)


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of huggingface_hub's cache holds; None for other folders."""
    name = folder.resolve().name
    is_snapshot = folder.resolve().parent.name == "snapshots" and _COMMIT.fullmatch(name)
    return name if is_snapshot else None


def _published(model: str, revision: str | None) -> tuple[str, dict[str, int | None]]:
    """Return the commit, and name -> bytes of its small files and of its weights in one file.

    Where the hub cannot be asked, they are those of the commit that is on this machine.
    """
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    wanted, unwanted = [*_SMALL, SINGLE_FILE], list(_NESTED)
    try:
        found = _dry_run(model, revision, wanted, unwanted)
    except (DryRunError, LocalEntryNotFoundError):
        folder = _fetch(model, revision, ("config.json",), (), _bar(no_progress, 0, Event()))
        here = [path for path in folder.rglob("*") if path.is_file()]
        sizes: dict[str, int | None]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in here}
        kept = filter_repo_objects(sizes, allow_patterns=wanted, ignore_patterns=unwanted)
        return folder.name, {name: sizes[name] for name in kept}
    return found[0].commit_hash if found else "", {f.filename: f.file_size for f in found}


def _dry_run(model: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> list[Any]:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        model, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, dry_run=True,
        tqdm_class=_bar(no_progress, 0, Event()),
    )  # fmt: skip
    return list(found)


def _fetch(
    model: str, revision: str | None, wanted: tuple[str, ...], unwanted: tuple[str, ...], bar: type,
) -> Path:  # fmt: skip
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        model, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted),
        tqdm_class=bar,
    )  # fmt: skip
    return Path(folder)


def _check_space(model: str, commit: str, files: tuple[str, ...]) -> int:
    """Return the bytes that are still to be fetched, once they are known to fit on the disk."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = _dry_run(model, commit, list(files), [])
    need = sum(file.file_size or 0 for file in found if file.will_download)
    hint = "free some space, or let HF_HOME name a folder on another disk; the store comes on top"
    check_space(Path(HF_HUB_CACHE), need, f"{model} is downloaded there: {hint}")
    return need


def _interruptibly(job: Callable[[], Path], stop: Event) -> Path:
    # Ctrl-C reaches the main thread. In there, huggingface_hub would wait for files of gigabytes to
    # be complete; from here, its threads can be told to stop at their next piece.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        try:
            return running.result()
        except BaseException:
            stop.set()
            raise


class _Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Ends a download thread from inside its progress bar."""


def _bar(progress: Progress, total_bytes: int, stop: Event) -> type:
    """Make a class that huggingface_hub takes for tqdm and that tells `progress` instead."""
    from huggingface_hub.utils import tqdm

    lock = Lock()

    class Bar(tqdm):  # type: ignore[misc]
        """Counts in silence; one of the library's bars, the one of bytes written, is passed on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = str(kwargs.get("name") or "")
            self.is_bytes = kwargs.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped
            with lock:
                self.n += n or 0
                if self.is_bytes and self.n > 0:
                    total = max(self.total or 0, total_bytes, self.n)
                    progress(DOWNLOADING, int(self.n), int(total))

    return Bar


@contextmanager
def _readable_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model}: is gated: accept its terms on its page of the hub, then {_LOGIN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: the hub has no such model, or it is private; check the name, or {_LOGIN}; "
            f"no folder {model} here"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{model}: the hub has no revision {revision!r:.80} of it; "
            "give a branch, a tag or a whole commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        status = _status(error.__cause__)
        if status in (401, 403):
            raise ModelError(f"{model}: the hub answers {status}: {_LOGIN}") from error
        why = f"the hub answers {status}" if status else "the hub cannot be reached"
        raise ModelError(
            f"{model}: not, or not completely, on this machine and {why}; "
            "check the network and HF_HUB_OFFLINE, or give the folder of a downloaded model; "
            f"no folder {model} here"
        ) from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        status = _status(error)
        advice = f"; {_LOGIN}" if status in (401, 403) else "; run again, finished files are kept"
        raise ModelError(f"{model}: cannot be fetched from the hub: {reason}{advice}") from error


def _status(error: BaseException | None) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
