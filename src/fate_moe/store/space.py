"""Is there room on disk for what will be written, and what went wrong where it was not written?

Asked before the first byte, because a conversion that fails after an hour for want of space helps
nobody. Knows nothing of quotas, which the system does not tell in advance: those show when a write
fails.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from fate_moe.config import format_bytes
from fate_moe.errors import StoreError


def check_space(folder: Path, need_bytes: int, what_to_try: str) -> None:
    """Check that `need_bytes` more fit into the file system of `folder`, which need not exist yet.

    Raises:
        StoreError: they do not; names the folder, what is needed and free, and `what_to_try`.
        OSError: the file system cannot be asked.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < need_bytes:
        raise StoreError(
            f"{folder}: not enough disk space: need {format_bytes(need_bytes)} more, have "
            f"{format_bytes(free)} free; {what_to_try}"
        )


def held_bytes(folder: Path) -> int:
    """Add up the files that lie directly in a folder; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def write_error(out: Path, error: OSError) -> StoreError:
    """Say in one line why a store cannot be written at `out`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{out}: the disk is full; free some space and run again, finished layers are kept"
        )
    where = error.filename or out
    return StoreError(f"{where}: cannot be written: {error.strerror or error}")
