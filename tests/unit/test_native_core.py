"""Which instructions the native core takes."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fate_moe import native
from fate_moe.errors import ConfigError

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.why_missing)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = native.core().isa()
    yield
    native.core().use_isa(before)


def test_other_instructions_can_be_named() -> None:
    for name in native.core().isas():
        native.use_instructions(name)
        assert native.core().isa() == name


def test_unknown_instructions_are_refused() -> None:
    known = ", ".join(native.core().isas())
    with pytest.raises(ConfigError, match=f"'abacus' is none that this processor has: {known}"):
        native.use_instructions("abacus")


def test_the_command_line_reads_the_environment() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fate_moe", "models"],
        env={**os.environ, "FATE_ISA": "abacus"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("fate: FATE_ISA: 'abacus' is none that this processor has")
    assert "Traceback" not in done.stderr
