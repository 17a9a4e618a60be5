"""The training's modules, importable and at tiny size."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The student's module at tiny size: 32 shared neurons, 4 experts of 32, top-2."""
    import smolmoe_student

    for name, value in (("SHARED_WIDTH", 32), ("NUM_EXPERTS", 4), ("EXPERT_WIDTH", 32),
                        ("TOP_K", 2), ("ROUTER_SPREAD", 0.5)):  # fmt: skip
        monkeypatch.setattr(smolmoe_student, name, value)
    return smolmoe_student
