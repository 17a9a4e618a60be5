"""Does converting side by side change nothing but the time: no byte, no error, no resuming?"""

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest

from fate_moe.errors import ConfigError, ModelError
from fate_moe.store.convert import SourceLayer, convert
from fate_moe.store.verify import verify
from fate_moe.types import ExpertKey
from tests.unit.store.formula import FormulaSource, formula

EXPERTS = 9


@pytest.fixture
def wide(source: FormulaSource) -> FormulaSource:
    """Two layers of nine experts; the later ones of a layer are made faster."""
    source.layers = tuple(
        SourceLayer(
            path=layer.path,
            num_experts=EXPERTS,
            record_bytes=layer.record_bytes,
            head_bytes=layer.head_bytes,
            transposed=layer.transposed,
            params={"down_proj": (EXPERTS, 8, 64)},
            layout=layer.layout,
        )
        for layer in source.layers
    )
    real = source.record

    def record(key: ExpertKey) -> memoryview:
        time.sleep(0.001 * (EXPERTS - key.expert))
        return real(key)

    source.record = record  # type: ignore[method-assign]
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fate-convert")]


def test_the_store_is_the_same_for_any_number_of_jobs(wide: FormulaSource, tmp_path: Path) -> None:
    stores = []
    for jobs in (1, 2, 5, 256, None):
        out = tmp_path / f"store-{jobs}"
        convert(wide, out, jobs=jobs)
        assert verify(out).records == 2 * EXPERTS
        stores.append(contents(out))
    assert all(store == stores[0] for store in stores)
    assert workers() == []


def test_experts_are_made_side_by_side_but_never_more_than_a_layer_has(
    wide: FormulaSource, tmp_path: Path
) -> None:
    lock = threading.Lock()
    real = wide.record
    for jobs, need in ((1, 1), (3, 3), (100, EXPERTS)):
        now = most = 0
        meet = threading.Barrier(need)  # broken by its timeout if fewer ever meet

        def record(key: ExpertKey, meet: threading.Barrier = meet) -> memoryview:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            meet.wait(timeout=20)
            time.sleep(0.02)  # time for one too many to show
            with lock:
                now -= 1
            return real(key)

        wide.record = record  # type: ignore[method-assign]
        convert(wide, tmp_path / f"store-{jobs}", jobs=jobs)
        assert most <= need


@pytest.mark.parametrize("jobs", [1, 4])
def test_few_records_are_in_memory(jobs: int, wide: FormulaSource, tmp_path: Path) -> None:
    class Record(bytearray):
        """Bytes that can be watched."""

    alive: weakref.WeakSet[Record] = weakref.WeakSet()
    counts: list[int] = []

    def record(key: ExpertKey) -> memoryview:
        made = Record(formula(key, wide.layers[key.layer].record_bytes))
        alive.add(made)
        counts.append(len(alive))
        return memoryview(made)

    def slow(what: str, done: int, total: int) -> None:
        time.sleep(0.003)  # writing is what takes long

    # A set hashes its members, which bytearrays do not allow by themselves.
    Record.__hash__ = object.__hash__  # type: ignore[assignment]
    wide.record = record  # type: ignore[method-assign]
    convert(wide, tmp_path / "store", jobs=jobs, progress=slow)
    gc.collect()
    assert max(counts) <= jobs + 2
    assert len(alive) == 0


@pytest.mark.parametrize("jobs", [1, 4])
def test_the_first_bad_expert_is_named(jobs: int, wide: FormulaSource, tmp_path: Path) -> None:
    for expert in (3, 5):
        wide.fail_at[ExpertKey(0, expert)] = ModelError(f"expert {expert} holds NaN")
    with pytest.raises(ModelError, match="expert 3 holds NaN"):
        convert(wide, tmp_path / "store", jobs=jobs)
    assert not (tmp_path / "store").exists()
    assert workers() == []
    wide.fail_at.clear()
    convert(wide, tmp_path / "store", jobs=jobs)
    assert verify(tmp_path / "store").is_intact


def test_an_interrupt_of_the_caller_stops_the_workers(wide: FormulaSource, tmp_path: Path) -> None:
    written = 2 * 4096 + EXPERTS * 4096 + 2 * 8192  # two records of the second layer

    def interrupt(what: str, done: int, total: int) -> None:
        if done > written:
            raise KeyboardInterrupt

    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(wide, out, jobs=3, progress=interrupt)
    assert workers() == []  # while the traceback still holds everything
    del caught
    assert len(wide.encoded) < 2 * EXPERTS
    wide.encoded.clear()
    convert(wide, out, jobs=3)
    assert {key.layer for key in wide.encoded} == {1}
    assert verify(out).is_intact


def test_progress_is_told_by_the_callers_thread(wide: FormulaSource, tmp_path: Path) -> None:
    threads = set()
    convert(
        wide,
        tmp_path / "store",
        jobs=4,
        progress=lambda *step: threads.add(threading.current_thread()),
    )
    assert threads == {threading.current_thread()}


def test_a_number_that_cannot_be_is_refused_first(source: FormulaSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs: have 0, need 1 to 256"):
        convert(source, tmp_path / "store", jobs=0)
    assert not (tmp_path / "store.partial").exists()
