"""Ctrl-C: exit code 130, one line, nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fate_moe.store.format import is_store
from fate_moe.store.verify import verify
from tests import tiny

SLOW = """
import sys, time
import fate_moe.{module} as home
real = home.{name}
def slow(*args, **kwargs):
    print("begun", file=sys.stderr, flush=True)
    time.sleep(0.2)
    return real(*args, **kwargs)
home.{name} = slow
sys.argv[0] = "fate"
from fate_moe.cli import main
main()
"""


def interrupt(module: str, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with one function slowed down; press Ctrl-C once it is under way."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(module=module, name=name), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "begun" in first, first
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.skipif(sys.platform == "win32", reason="signals work differently there")
def test_during_convert(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    done = interrupt("models.checkpoint", "encode", "convert", str(tiny_checkpoint), str(out))
    assert done.returncode == 130
    # Two threads may have begun at once, and a line and its end come apart.
    assert [x for x in done.stderr.splitlines() if x.replace("begun", "")] == ["fate: interrupted"]
    assert not out.exists()
    # The next try goes on and makes a sound store.
    again = subprocess.run(
        [sys.executable, "-m", "fate_moe", "convert", str(tiny_checkpoint), str(out)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert verify(out).records == tiny.LAYERS * tiny.EXPERTS
    assert [p for p in tmp_path.iterdir() if is_store(p)] == [out]


@pytest.mark.skipif(sys.platform == "win32", reason="signals work differently there")
def test_during_generate(tiny_store: Path) -> None:
    done = interrupt(
        "moe", "choice_of", "generate", str(tiny_store), "-p", "hello", "-n", "200", "--json"
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert {x for x in done.stderr.splitlines() if x != "begun"} == {"fate: interrupted"}
