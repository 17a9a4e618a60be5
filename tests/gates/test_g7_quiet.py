"""G7: importing prints nothing, reads no environment variable, starts no thread."""

import subprocess
import sys

import pytest

WATCH = """
import os, sys, threading
touched = []
class Watched(type(os.environ)):
    def __getitem__(self, name):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        touched.append((caller, name))
        return super().__getitem__(name)
    def get(self, name, default=None):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        touched.append((caller, name))
        return super().get(name, default)
os.environ.__class__ = Watched
before = threading.active_count()
import {module}
ours = [t for t in touched if t[0].startswith("fate_moe")]
assert not ours, ours
assert threading.active_count() == before
"""

MODULES = [
    "fate_moe",
    "fate_moe.cache",
    "fate_moe.cli",
    "fate_moe.engine",
    "fate_moe.models.load",
    "fate_moe.prefetch.mover",
    "fate_moe.reference",
    "fate_moe.store.reader",
]


@pytest.mark.parametrize("module", MODULES)
def test_import_is_quiet(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(module=module)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "module",
    ["fate_moe", "fate_moe.cache", "fate_moe.config", "fate_moe.prefetch.queue",
     "fate_moe.telemetry", "fate_moe.types", "fate_moe.budget"],
)  # fmt: skip
def test_the_pure_half_runs_without_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
