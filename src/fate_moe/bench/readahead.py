"""How far does the system read ahead of a program that maps its files, and can that be changed?

Such programs live and die by it: far ahead is right for a whole file in order, and wrong for
experts here and there. Linux; changing it needs root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fate_moe.errors import ConfigError

_DEVICES = Path("/sys/dev/block")
_MOST_KIB = 1 << 20


def disk_of(path: Path) -> Path | None:
    """Find the folder in /sys of the disk that holds a file; None where it lies on none."""
    number = path.stat().st_dev
    device = (_DEVICES / f"{os.major(number)}:{os.minor(number)}").resolve()
    for folder in (device, device.parent):  # a partition's settings are its disk's
        if _setting(folder).is_file():
            return folder
    return None


def device_of(disk: Path) -> str:
    """Return a disk's numbers, such as "254:0".

    Raises:
        ConfigError: it has none.
    """
    try:
        return (disk / "dev").read_text().strip()
    except OSError as error:
        raise ConfigError(f"{disk}: {error.strerror or error}") from error


def read_kib(disk: Path) -> int | None:
    """Return how far is read ahead, in KiB."""
    try:
        return int(_setting(disk).read_text())
    except (OSError, ValueError):
        return None


def parse_kib(text: str) -> list[int]:
    """Read `128,8192`.

    Raises:
        ConfigError: it is no list of numbers of KiB.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) <= _MOST_KIB for part in parts):
        raise ConfigError(
            f"readahead: {text!r:.80}: need numbers of KiB up to {_MOST_KIB}, such as 128,8192"
        )
    return [int(part) for part in parts]


def why_fixed(disk: Path | None) -> str | None:
    """Say why readahead cannot be changed; None when it can."""
    if disk is None:
        return "the models lie on no disk that has one"
    if not os.access(_setting(disk), os.W_OK):
        return f"{_setting(disk)} cannot be written; run as root"
    return None


@contextmanager
def reading_ahead(disk: Path | None, kib: int | None) -> Iterator[None]:
    """Within the scope, read `kib` ahead; None leaves the machine's own.

    Raises:
        ConfigError: it cannot be set.
    """
    if disk is None or kib is None:
        yield
        return
    setting = _setting(disk)
    try:
        before = setting.read_text()
        setting.write_text(str(kib))
    except OSError as error:
        raise ConfigError(f"readahead: {setting}: {error.strerror or error}") from error
    try:
        yield
    finally:
        setting.write_text(before)


def _setting(disk: Path) -> Path:
    return disk / "queue" / "read_ahead_kb"
