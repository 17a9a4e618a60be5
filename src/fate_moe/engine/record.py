"""What did the routers of a run choose? Written down as a trace while the model runs.

Watching costs time (every router is asked once more for its scores) and changes no result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError
from fate_moe.sim.trace import Step, Trace
from fate_moe.types import Choice, Prediction

MOST_STEPS = 1 << 20


class Recorder:
    """Watches an engine. Use as a context manager; ask for the `trace` afterwards.

    A step counts once all its layers have chosen; one that fails on the way is left out.
    """

    def __init__(self, engine: Engine, on_step: Callable[[int], None] = lambda done: None) -> None:
        """Watch nothing yet.

        Args:
            on_step: told how many steps have been recorded.
        """
        self._engine = engine
        self._on_step = on_step
        self._layers = len(engine.layers)
        self._experts = tuple(engine.blueprint.experts)
        self._steps: list[Step] = []
        self._scores: list[NDArray[np.float16]] = []
        self._similarity: list[NDArray[np.float16]] = []
        self._now = _Now(self._layers, self._experts)

    def __enter__(self) -> Recorder:
        for layer in self._engine.layers:
            layer.observer = self
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self._engine.layers:
            layer.observer = None

    def asked(self, layer: int, gate_input: Tensor, guess: Prediction | None) -> None:
        """See a gate input [T, D], and the guess for the next layer."""
        self._begin(layer)
        now, before = self._now, self._now.last_input
        if before is not None and before.shape == gate_input.shape:
            alike = F.cosine_similarity(gate_input.float(), before, dim=-1)
            now.similarity[layer] = float(alike.mean())
        now.last_input = gate_input.float().clone()  # what it lies in may be used again
        if guess is not None:
            now.guesses[guess.layer] = guess
        router = self._engine.routers[layer]
        if router is not None:
            with torch.no_grad():
                scores, _ = router(gate_input)
            now.scores[layer, : scores.shape[1]] = scores.float().mean(dim=0).cpu().numpy()

    def sharpened(self, guess: Prediction) -> None:
        """See a second guess, which takes the first one's place."""
        self._begin(guess.layer)
        self._now.guesses[guess.layer] = guess

    def chose(self, choice: Choice) -> None:
        """See what a router chose."""
        now = self._now
        now.choices[choice.layer] = choice
        choices = [one for one in now.choices if one is not None]
        if choice.layer + 1 < self._layers or len(choices) < self._layers:
            return
        if len(self._steps) >= MOST_STEPS:
            raise ConfigError(f"trace: it has {MOST_STEPS} steps, the most there may be")
        self._steps.append(Step(choices, now.guesses))
        self._scores.append(now.scores.astype(np.float16))
        self._similarity.append(now.similarity.astype(np.float16))
        self._on_step(len(self._steps))

    def _begin(self, layer: int) -> None:
        if layer == 0 and self._now.last_input is not None:
            self._now = _Now(self._layers, self._experts)

    @property
    def trace(self) -> Trace:
        """All steps so far."""
        blueprint = self._engine.blueprint
        predictor = blueprint.config.predict.predictor
        return Trace(
            model=blueprint.store.name[:200],
            experts=self._experts,
            top_k=blueprint.skeleton.top_k,
            steps=self._steps,
            record_bytes=tuple(layer.record_bytes for layer in blueprint.manifest.layers),
            predictor="" if predictor == "none" else predictor,
            scores=np.stack(self._scores) if self._scores else None,
            similarity=np.stack(self._similarity) if self._similarity else None,
        )


class _Now:
    """The step that is on."""

    def __init__(self, layers: int, experts: tuple[int, ...]) -> None:
        self.choices: list[Choice | None] = [None] * layers
        self.guesses: list[Prediction | None] = [None] * layers
        self.last_input: Tensor | None = None
        self.scores = np.zeros((layers, max(experts)), np.float32)
        self.similarity = np.full(layers, np.nan, np.float32)
