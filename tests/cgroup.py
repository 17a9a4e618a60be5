"""Run a command inside a memory cgroup of its own (Linux, v2 or v1, needs root)."""

import os
import sys
from pathlib import Path

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")


def _root() -> tuple[Path, str] | None:
    if (_V2 / "cgroup.controllers").is_file():
        return _V2, "memory.max"
    if (_V1 / "memory.limit_in_bytes").is_file():
        return _V1, "memory.limit_in_bytes"
    return None


def unavailable() -> str | None:
    """Say why no memory cgroup can be made, or None when one can."""
    root = _root()
    if root is None:
        return "no memory controller is mounted"
    probe = root[0] / f"fate-test-{os.getpid()}"
    try:
        probe.mkdir()
        limit = probe / root[1]
        return None if limit.is_file() and os.access(limit, os.W_OK) else f"no {root[1]} in {probe}"
    except OSError as error:
        return str(error)
    finally:
        if probe.is_dir():
            probe.rmdir()


def limited(command: list[str], limit_bytes: int) -> list[str]:
    """Wrap a command so that it and its children share `limit_bytes`."""
    return [sys.executable, __file__, str(limit_bytes), *command]


def _main() -> int:
    import subprocess

    limit_bytes, command = int(sys.argv[1]), sys.argv[2:]
    root = _root()
    if root is None:
        raise SystemExit("no memory controller is mounted")
    group = root[0] / f"fate-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / root[1]).write_text(str(limit_bytes))
        child = subprocess.Popen(command, preexec_fn=lambda: _enter(group))
        return child.wait()
    finally:
        group.rmdir()


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


if __name__ == "__main__":
    sys.exit(_main())
