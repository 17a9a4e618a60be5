"""Fixtures that several suites share."""

import os

# Before anything imports Triton: it decides as its functions are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from fate_moe import native
from fate_moe.config import DEFAULT_POLICY, make_config
from fate_moe.engine import Engine, build
from fate_moe.engine.prepare import convert_model, find_store
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import FileReader
from tests import tiny

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

if isa := os.environ.get("FATE_ISA"):  # as for the command line
    native.use_instructions(isa)

# No test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tiny matrices: threads only cost


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what runs smolmoe in one process: each takes a GB, and some measure time and memory."""
    for item in items:
        if item.get_closest_marker("smolmoe"):
            item.add_marker(pytest.mark.xdist_group("smolmoe"))


@pytest.fixture(scope="session", autouse=True)
def _imports_out_of_the_collectors_sight() -> None:
    """Every conversion collects garbage: a quarter of a second over all that torch has made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The folder that the demo uses too, so that smolmoe is built once."""
    own = os.environ.get("FATE_CACHE")
    return Path(own) if own else Path.home() / ".cache" / "fate"


@pytest.fixture(scope="session")
def smolmoe_store(cache_dir: Path) -> Path:
    return find_store("smolmoe", cache_dir=cache_dir)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen2_moe checkpoint with a byte tokenizer: 6 layers, 16 experts, top-3."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_store(tiny_checkpoint: Path) -> Path:
    out = tiny_checkpoint.parent / "store"
    convert_model(str(tiny_checkpoint), out, cache_dir=out.parent)
    return out


Open = Callable[..., Engine]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """Build engines and close them: open_engine(store, delay=seconds or function, **settings)."""
    engines: list[Engine] = []

    def make(
        store: Path, *, delay: Any = None, policy: str = DEFAULT_POLICY, **choices: object
    ) -> Engine:
        reader = None
        if delay is not None:
            inner = FileReader(store, read_manifest(store))
            reader = tiny.SlowReader(inner, delay if callable(delay) else lambda key: delay)
        engines.append(build(store, make_config(policy, **choices), reader=reader))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
