"""What the store tests share."""

import json
from pathlib import Path

import pytest

from tests.unit.store.formula import FormulaSource


@pytest.fixture
def source(tmp_path: Path) -> FormulaSource:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    return FormulaSource(folder)
