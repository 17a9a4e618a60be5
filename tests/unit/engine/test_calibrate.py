"""Calibrating finds what a linear map can find, keeps what helps, and changes no answer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fate_moe.engine.calibrate import _Fits, _Sums, calibrate
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError
from fate_moe.predict.ridge import FittedRouter
from fate_moe.store.format import read_manifest
from tests import tiny

Open = Callable[..., Engine]


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.SIZES["vocab_size"], (tokens,), generator=draw)


def test_sums_solve_what_is_linear() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 6, generator=draw), torch.randn(5, generator=draw)
    sums = _Sums(2)
    for size in (100, 300):
        x = torch.randn(size, 6, generator=draw) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
        sums.add(x.double(), (x @ weight.T + bias).double())
    found = sums.solve(is_normed=False)
    x = torch.randn(50, 6, generator=draw) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    scores, ids = found(x)
    want = x @ weight.T + bias
    assert torch.allclose(scores, want, atol=0.02 * float(want.std()))
    assert ids.shape == (50, 2)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    sums = _Sums(1)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)).double()
    x[:, 2] = 7
    sums.add(x, x[:, :1].repeat(1, 4))
    found = sums.solve(is_normed=False)
    assert found.weight.isfinite().all()
    assert found.weight[:, 0].allclose(torch.ones(4), atol=0.01)


@pytest.fixture
def calibrated(store: Path, open_engine: Open) -> Path:
    engine = open_engine(store, experts="60%")
    rows = calibrate(engine, text(4096))
    assert [row.layer for row in rows] == list(range(tiny.LAYERS))
    assert rows[0].paper is None
    assert rows[0].early is None
    late = [row.late for row in rows if row.late is not None]
    early = [(row.early, row.paper) for row in rows if row.early is not None]
    assert len(late) >= 4
    assert len(early) >= 3
    assert all(one > paper for one, paper in early if paper is not None)
    assert all(row.width == 5 for row in rows)  # half as many again as top-3
    assert all(not layer._forward_pre_hooks for layer in engine.model.model.layers)
    return store


def test_maps_help_where_they_are_used(calibrated: Path, open_engine: Open) -> None:
    recall, answers = {}, {}
    for name in ("cross_layer", "ridge"):
        engine = open_engine(calibrated, experts="60%", predictor=name)
        answers[name] = engine.model.generate(
            text(20, seed=5)[None], max_new_tokens=40, do_sample=False, eos_token_id=None
        ).tolist()
        report = engine.report()
        recall[name] = report.phases["decode"]["recall"]
        assert report.guesses_used > 0
    assert answers["ridge"] == answers["cross_layer"]
    assert recall["ridge"] > recall["cross_layer"]  # type: ignore[operator]


def test_the_plan_counts_the_maps(calibrated: Path, tiny_store: Path, open_engine: Open) -> None:
    fitted = read_manifest(calibrated).fitted
    assert fitted is not None
    plans = [
        open_engine(one, experts="60%").blueprint.memory.demands.workspace_bytes
        for one in (calibrated, tiny_store)
    ]
    assert plans[0] - plans[1] == 3 * fitted.bytes


def test_turns_give_the_same(
    store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fate_moe.engine import calibrate as module

    whole = calibrate(open_engine(store, experts="60%"), text(2560))
    monkeypatch.setattr(module, "_SUMS_BYTES", 1)  # a layer at a time
    told: list[tuple[int, int]] = []
    again = calibrate(
        open_engine(store, experts="60%"), text(2560),
        lambda what, done, total: told.append((done, total)),
    )  # fmt: skip
    assert again == whole
    assert told[-1] == (tiny.LAYERS * 10, tiny.LAYERS * 10)


def test_another_text_judges(store: Path, open_engine: Open) -> None:
    told: list[int] = []
    rows = calibrate(
        open_engine(store, experts="60%"), text(2560),
        lambda what, done, total: told.append(total), text(512, seed=9),
    )  # fmt: skip
    assert told[-1] == 10 + 2
    other = calibrate(open_engine(store, experts="60%"), text(2560), judge_ids=text(512, seed=8))
    assert [row.late for row in rows] != [row.late for row in other]


def test_only_maps_that_find_more_are_kept(store: Path, open_engine: Open) -> None:
    fits = _Fits(open_engine(store, experts="60%"))
    one = FittedRouter(torch.zeros(16, 64), torch.zeros(16), 3, is_normed=False)
    rows = []
    for layer, (paper, early, late) in enumerate(
        [(0.5, 0.4, 0.45), (0.5, 0.6, 0.6), (0.5, 0.6, 0.7), (0.5, 0.4, 0.6)]
    ):
        for name, found in (("paper", paper), ("early", early), ("late", late)):
            fits._marks[name, layer] = [100 * found, 100]
            fits._maps[name, layer] = one
        rows.append(fits.row(layer))
    assert [(row.early, row.late) for row in rows] == [
        (None, None), (0.6, None), (0.6, 0.7), (None, 0.6)
    ]  # fmt: skip
    kept = fits.kept(rows)
    assert [one is not None for one in kept["early"]] == [False, True, True, False, False, False]
    assert [one is not None for one in kept["late"]] == [False, False, True, True, False, False]


def test_too_little_text_is_one_line(store: Path, open_engine: Open) -> None:
    with pytest.raises(ConfigError, match="text: 100 tokens, calibrating takes 2048 or more"):
        calibrate(open_engine(store, experts="60%"), text(100))
    assert read_manifest(store).fitted is None
