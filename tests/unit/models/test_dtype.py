"""Which dtype `auto` means: by processor and compute path, see decision 0003."""

import pytest
import torch

from fate_moe.models import load
from fate_moe.models.load import choose_dtype


@pytest.mark.parametrize(
    ("saved", "natively", "has_bfloat16", "want"),
    [
        (torch.bfloat16, False, True, torch.bfloat16),
        (torch.bfloat16, False, False, torch.float32),
        (torch.bfloat16, True, True, torch.float32),
        (torch.bfloat16, True, False, torch.float32),
        (torch.float32, False, True, torch.float32),
    ],
)
def test_auto(
    saved: torch.dtype,
    natively: bool,
    has_bfloat16: bool,
    want: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_has_native_bfloat16", lambda: has_bfloat16)
    assert choose_dtype("auto", saved, natively) is want
    assert choose_dtype("bfloat16", saved, natively) is torch.bfloat16
