"""Which linear maps tell a router's scores ahead of it, fitted on a text?

Ridge regression in closed form, layer by layer, from sums over the tokens of most of the text; the
rest judges, or another text. A map is kept only where it finds more of what the router takes than
the paper's question to the next router does. The model runs as it always does; layers share the
memory for sums in turns, each a run over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fate_moe.engine.demands import SHORT_CHUNK_TOKENS
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError, ModelError
from fate_moe.predict import Router
from fate_moe.predict.ridge import NORM_EPS, FittedRouter, guess_width
from fate_moe.store.fitted import STAGES, Map, Maps, write_fitted
from fate_moe.types import Choice, Prediction, Progress, no_progress

SHRINK = 1e-3  # ridge, as a share of a feature's variance
HELD_OUT = 5  # every fifth piece of the text judges
FEWEST_TOKENS = 2048
_SUMS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How well a layer's router is told ahead, on text that was not fitted.

    Attributes:
        width: experts guessed for one token.
        paper: recall of the question to the layer's own router with the gate input of the layer
            before; None for the first layer.
        early, late: recall of the maps; None where there is none, or it was not kept.
    """

    layer: int
    width: int
    paper: float | None
    early: float | None
    late: float | None


def calibrate(
    engine: Engine,
    ids: Tensor,
    progress: Progress = no_progress,
    judge_ids: Tensor | None = None,
) -> list[LayerFit]:
    """Fit maps on a text, and write those that help into the engine's store.

    Args:
        engine: of the model; it goes on as it was, the next one that is built uses the maps.
        ids: tokens of the text, [N].
        judge_ids: tokens of another text that judges; None: every fifth piece of the first does.
    Returns:
        One row per layer.
    Raises:
        ConfigError: the text is too short, no map helps, or the model is on a GPU; ModelError: no
        router can be asked; StoreError: the store cannot be written.
    """
    if engine.blueprint.card is not None:
        raise ConfigError("vram: maps are fitted on the processor; load the model without vram")
    if len(ids) < FEWEST_TOKENS:
        raise ConfigError(f"text: {len(ids)} tokens, calibrating takes {FEWEST_TOKENS} or more")
    layers = [layer for layer, router in enumerate(engine.routers) if router is not None]
    if not layers:
        raise ModelError("its routers need more than a gate input, so none can be told ahead")
    fits = _Fits(engine)
    per_turn = max(1, _SUMS_BYTES // fits.layer_bytes)
    turns = [layers[i : i + per_turn] for i in range(0, len(layers), per_turn)]
    fit, judge = _pieces(ids, judge_ids, min(SHORT_CHUNK_TOKENS, engine.context_tokens))
    runs = _Runs(engine, len(turns) * len(fit + judge), progress)
    for turn in turns:
        runs.over(fit, fits.learner(turn))
        fits.solve(turn)
        runs.over(judge, fits.judge(turn))
    rows = [fits.row(layer) for layer in layers]
    if all(row.early is None and row.late is None for row in rows):
        raise ConfigError(
            f"text: {len(ids)} tokens are too few: no map tells a router better than it does when "
            "asked ahead; give more of it (--tokens). The store is as it was"
        )
    write_fitted(engine.blueprint.store, engine.blueprint.manifest, fits.kept(rows))
    return rows


def _pieces(ids: Tensor, judge_ids: Tensor | None, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut texts into what the model reads at once: to fit on, and to judge with."""
    fit = [piece for piece in torch.split(ids, most) if len(piece) > 1]
    if judge_ids is not None:
        return fit, [piece for piece in torch.split(judge_ids, most) if len(piece) > 1]
    return (
        [piece for number, piece in enumerate(fit) if number % HELD_OUT != HELD_OUT - 1],
        fit[HELD_OUT - 1 :: HELD_OUT],
    )


Look = Callable[[int, Tensor, Tensor | None, Tensor], None]
"""(layer, what enters it, the gate input before it, its own gate input), each [T, D]."""


class _Runs:
    """Runs the model over pieces of text and shows what enters layers and routers."""

    def __init__(self, engine: Engine, total: int, progress: Progress) -> None:
        self._engine = engine
        self._total = total
        self._done = 0
        self._progress = progress

    def over(self, pieces: Sequence[Tensor], look: Look) -> None:
        """Run over some pieces."""
        watcher = _Watcher(look)
        hooks = [
            site.register_forward_pre_hook(watcher.hook(layer), with_kwargs=True)
            for layer, site in enumerate(self._engine.decoder_layers)
            if site is not None
        ]
        for layer in self._engine.layers:
            layer.observer = watcher
        try:
            for piece in pieces:
                self._progress("calibrating", self._done, self._total)
                self._done += 1
                with torch.no_grad():
                    self._engine.model(input_ids=piece[None], use_cache=False)
        finally:
            for layer in self._engine.layers:
                layer.observer = None
            for hook in hooks:
                hook.remove()
        self._progress("calibrating", self._done, self._total)


class _Watcher:
    """An observer that remembers what a router will be compared with."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._entering: dict[int, Tensor] = {}
        self._before: Tensor | None = None

    def hook(self, layer: int) -> Callable[..., None]:
        """Return a hook that notes what enters a decoder layer."""

        def note(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._entering[layer] = hidden.reshape(-1, hidden.shape[-1]).clone()

        return note

    def asked(self, layer: int, gate_input: Tensor, guess: Prediction | None) -> None:
        """Show a layer's inputs."""
        before = None if layer == 0 else self._before
        entering = self._entering.pop(layer, None)
        if entering is not None:
            self._look(layer, entering, before, gate_input)
        self._before = gate_input.clone()

    def sharpened(self, guess: Prediction) -> None:
        """Guesses are not what is compared."""

    def chose(self, choice: Choice) -> None:
        """What was chosen for all tokens together says nothing here."""


class _Fits:
    """Sums, maps and marks of all layers."""

    def __init__(self, engine: Engine) -> None:
        self._routers: Sequence[Router | None] = engine.routers
        self._hidden = engine.blueprint.skeleton.hidden
        self._percentile = engine.blueprint.config.predict.percentile
        self._layers = len(engine.layers)
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._maps: dict[tuple[str, int], FittedRouter] = {}
        self._marks: dict[tuple[str, int], list[float]] = {}

    @property
    def layer_bytes(self) -> int:
        """Of a layer's sums, both stages, and of solving one."""
        return 8 * 5 * self._hidden**2

    def learner(self, layers: Sequence[int]) -> Look:
        """Return what takes in tokens that are fitted on."""

        def look(layer: int, entering: Tensor, before: Tensor | None, gate_input: Tensor) -> None:
            router = self._routers[layer]
            if layer not in layers or router is None:
                return
            scores, ids = router(gate_input)
            for stage, x in (("early", before), ("late", _normed(entering))):
                if x is not None:
                    sums = self._sums.setdefault((stage, layer), _Sums(ids.shape[1]))
                    sums.add(x.double(), scores.double())

        return look

    def solve(self, layers: Sequence[int]) -> None:
        """Turn the sums of some layers into maps."""
        for stage in STAGES:
            for layer in layers:
                sums = self._sums.pop((stage, layer), None)
                if sums is not None:
                    self._maps[stage, layer] = sums.solve(is_normed=stage == "late")

    def judge(self, layers: Sequence[int]) -> Look:
        """Return what takes in tokens that judge."""

        def look(layer: int, entering: Tensor, before: Tensor | None, gate_input: Tensor) -> None:
            router = self._routers[layer]
            if layer not in layers or router is None:
                return
            _, ids = router(gate_input)
            asked = [("late", self._maps.get(("late", layer)), entering)]
            if before is not None:
                asked += [("early", self._maps.get(("early", layer)), before)]
                asked += [("paper", router, before)]  # type: ignore[list-item]
            for name, one, x in asked:
                if one is not None:
                    found = one(x)[0].topk(self._width(ids.shape[1], router)).indices
                    hits = (found[:, :, None] == ids[:, None, :]).any(dim=1)
                    mark = self._marks.setdefault((name, layer), [0.0, 0.0])
                    mark[0] += float(hits.sum())
                    mark[1] += hits.numel()

        return look

    def row(self, layer: int) -> LayerFit:
        """Say how a layer did."""
        recall = {
            name: hits / of for (name, one), (hits, of) in self._marks.items() if one == layer
        }
        paper, early, late = (recall.get(name) for name in ("paper", "early", "late"))
        if early is not None and paper is not None and early <= paper:
            early = None
        if late is not None and late <= max(early or 0.0, paper or 0.0):
            late = None
        router = self._routers[layer]
        fitted = self._maps.get(("late", layer)) or self._maps.get(("early", layer))
        assert router is not None  # only such layers were fitted
        width = self._width(fitted.top_k if fitted else 1, router)
        return LayerFit(layer, width, paper, early, late)

    def _width(self, top_k: int, router: Router) -> int:
        return guess_width(top_k, router.num_experts, self._percentile)

    def kept(self, rows: Sequence[LayerFit]) -> Maps:
        """Return the maps that help, as arrays."""
        maps: dict[str, list[Map | None]] = {stage: [None] * self._layers for stage in STAGES}
        for row in rows:
            for stage in STAGES:
                one = self._maps.get((stage, row.layer))
                if one is not None and getattr(row, stage) is not None:
                    maps[stage][row.layer] = Map(
                        np.ascontiguousarray(one.weight.numpy()), one.bias.numpy()
                    )
        return maps


class _Sums:
    """What ridge regression needs of all tokens: float64 sums and products."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._count = 0
        self._x: Tensor | float = 0.0
        self._y: Tensor | float = 0.0
        self._xx: Tensor | float = 0.0
        self._xy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens: features [T, D], scores [T, E]."""
        self._count += len(x)
        self._x = self._x + x.sum(dim=0)
        self._y = self._y + y.sum(dim=0)
        self._xx = self._xx + x.T @ x
        self._xy = self._xy + x.T @ y

    def solve(self, *, is_normed: bool) -> FittedRouter:
        """Fit: features are centred and scaled to variance 1, so that none is shrunk more."""
        n = self._count
        x, y = torch.as_tensor(self._x) / n, torch.as_tensor(self._y) / n
        covariance = torch.as_tensor(self._xx) / n - torch.outer(x, x)
        scale = covariance.diagonal().clamp(min=0).sqrt() + 1e-9
        covariance = covariance / scale / scale[:, None]
        covariance.diagonal().add_(SHRINK)
        cross = (torch.as_tensor(self._xy) / n - torch.outer(x, y)) / scale[:, None]
        weight = torch.linalg.solve(covariance, cross) / scale[:, None]  # [D, E]
        bias = y - x @ weight
        return FittedRouter(weight.T.float().contiguous(), bias.float(), self.top_k, is_normed)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
