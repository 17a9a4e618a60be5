"""G5: a read error in the middle of a generation fails that request and nothing else."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.errors import ReadError
from fate_moe.models.load import load_tokenizer
from fate_moe.store.reader import FileReader, Request
from tests.conftest import Open


@pytest.mark.parametrize("policy", ["fate", "demand"])
def test_raises_read_error_and_goes_on(
    policy: str, tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tiny_store, policy=policy, experts="25%")
    conversation = Conversation(engine, load_tokenizer(tiny_store))
    wanted = conversation.ask("hello", Sampling(max_new_tokens=20)).token_ids
    conversation.forget()

    real = os.preadv
    heard: list[str] = []

    def broken(fd: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        if heard:  # in the middle: the first token is out
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset, *flags)

    class Broken:
        def read(self, wanted: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
            if heard:
                return [(0, errno.EIO)] * len(wanted)
            batches.append(len(wanted))
            outcome: list[tuple[int, int]] = reads.read(wanted)
            return outcome

    class BrokenCourier:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def landed(self) -> list[tuple[Request, int, float]]:
            found: list[tuple[Request, int, float]] = self.real.landed()
            batches.extend(1 for _ in found)
            return [(one, one.length or 0, ago_s) for one, _, ago_s in found] if heard else found

    monkeypatch.setattr(os, "preadv", broken)
    reader = engine.reader
    assert isinstance(reader, FileReader)
    reads, batches = reader._reads, list[int]()
    if reads is not None:
        background = reader._background
        assert background is not None
        monkeypatch.setattr(reader, "_reads", Broken())
        monkeypatch.setattr(background, "_courier", BrokenCourier(background._courier))
    with pytest.raises(ReadError, match=r"cannot read layer \d+, expert \d+: .*offset \d+") as e:
        conversation.ask("hello", Sampling(max_new_tokens=60), heard.append)
    assert e.value.errno == errno.EIO
    assert e.value.offset % 4096 == 0
    assert e.value.path.endswith(f"experts-{e.value.key.layer:05d}.safetensors")

    monkeypatch.setattr(os, "preadv", real)
    monkeypatch.setattr(reader, "_reads", reads)
    assert batches or reads is None
    assert conversation.ask("hello", Sampling(max_new_tokens=20)).token_ids == wanted
    assert all(entry.locks == 0 for entry in engine.mover.table.entries())
    engine.mover.table.check()
