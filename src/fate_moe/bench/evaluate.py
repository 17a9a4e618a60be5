"""What is measured of one model with one setting, and against which reference?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fate_moe.bench import tasks
from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import Questions
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError, StoreError
from fate_moe.telemetry import Report
from fate_moe.types import Progress


@dataclass(frozen=True, slots=True)
class Tasks:
    """What to measure.

    Attributes:
        text: for perplexity and for comparing with a reference; None = neither.
        sequence_tokens: length of the independent sequences that the text is cut into.
        most_tokens: of the text, evenly spread; None = all.
        written_tokens: the last tokens of each sequence, one by one after the others were read as a
            prompt, are all that counts; 0 = everything is read and counts.
        questions: sets of questions by name.
        json_prompts: chat prompts that ask for JSON.
    """

    text: str | None = None
    sequence_tokens: int = 512
    most_tokens: int | None = None
    written_tokens: int = 0
    questions: Mapping[str, Questions] = field(default_factory=dict)
    json_prompts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured; None = not asked for.

    Attributes:
        perplexity: of the text.
        tokens: predicted tokens of the text.
        kl: mean KL(reference, this) per token, in nats.
        top1_agreement: share of tokens where both find the same token likeliest.
        right: share of right answers per set of questions.
        asked: questions per set.
        valid_json: share of prompts whose answer is valid JSON.
        report: what the run did.
    """

    perplexity: float | None
    tokens: int | None
    kl: float | None
    top1_agreement: float | None
    right: Mapping[str, float]
    asked: Mapping[str, int]
    valid_json: float | None
    report: Report


class Reference:
    """The last hidden states of the text in the reference model, in a folder; one file a sequence.

    D numbers a token, where its scores would be V. Whoever is compared must have the same output
    projection.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._projection: tuple[float, ...] = ()

    def add(self, hidden: Tensor) -> None:
        """Keep the next sequence, [T, D].

        Raises:
            StoreError: the folder cannot take it.
        """
        try:
            save_file({"hidden": hidden.contiguous()}, self._file(self._count))
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{self._folder}: cannot keep the reference: {error}; free some space there, or "
                "name another cache folder"
            ) from error
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Tensor:
        """Return a sequence, [T, D]."""
        with safe_open(self._file(index), "pt") as file:
            hidden: Tensor = file.get_tensor("hidden")
        return hidden

    def remember_projection(self, likelihood: Likelihood) -> None:
        """Note the output projection that its hidden states belong to."""
        self._projection = _fingerprint(likelihood.halves.projection)

    def check_projection(self, likelihood: Likelihood) -> None:
        """Refuse a model with another output projection.

        Raises:
            ConfigError: it has one.
        """
        if _fingerprint(likelihood.halves.projection) != self._projection:
            raise ConfigError(
                "against: the reference has another output projection or vocabulary; "
                "give a store or checkpoint of the same model"
            )

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


def _fingerprint(weight: Tensor) -> tuple[float, ...]:
    # Float64 sums in a fixed order, a few rows at a time. Codes are told from values; values that
    # were widened from bfloat16, or will be for each product, are the same.
    total = square = 0.0
    for start in range(0, len(weight), 64):
        rows = weight[start : start + 64]
        total += rows.double().sum().item()
        square += rows.double().square().sum().item()
    return (*map(float, weight.shape), float(weight.dtype is torch.uint8), total, square)


@torch.no_grad()
def evaluate(
    engine: Engine,
    tokenizer: Any,
    wanted: Tasks,
    *,
    against: Reference | None = None,
    keep: Reference | None = None,
    progress: Progress,
) -> Evaluation:
    """Measure one engine.

    Args:
        wanted: what to measure.
        against: compare the text's scores with this.
        keep: put the text's hidden states here, to compare others with.
        progress: told about tokens, questions, prompts.
    Raises:
        ConfigError: the reference has another output projection; the text does not fit the context.
        ReadError: an expert could not be read.
    """
    likelihood = Likelihood(
        engine.model,
        engine.context_tokens,
        # What is unpopular in a step depends on who shares it.
        together=engine.blueprint.config.compute.int2 != "tail",
    )
    engine.reset()
    found = kl = top1 = None
    if wanted.text is not None:
        rows = tasks.sequences(tokenizer, wanted.text, wanted.sequence_tokens, wanted.most_tokens)
        comparison = None if against is None else _Comparison(likelihood, against)
        if keep is not None:
            keep.remember_projection(likelihood)
        total = sum(map(len, rows))
        found = tasks.perplexity(
            likelihood,
            rows,
            lambda done: progress("reading the text", done, total),
            lambda hidden: _note(hidden, keep, comparison),
            wanted.written_tokens,
        )
        if comparison is not None:
            kl, top1 = comparison.means
    right = {
        name: tasks.accuracy(likelihood, tokenizer, questions, _bar(progress, name, len(questions)))
        for name, questions in wanted.questions.items()
    }
    valid = None
    if wanted.json_prompts:
        bar = _bar(progress, "asking for JSON", len(wanted.json_prompts))
        valid = tasks.valid_json(engine, tokenizer, wanted.json_prompts, bar)
    return Evaluation(
        perplexity=None if found is None else found.perplexity,
        tokens=None if found is None else found.tokens,
        kl=kl,
        top1_agreement=top1,
        right=right,
        asked={name: len(questions) for name, questions in wanted.questions.items()},
        valid_json=valid,
        report=engine.report(),
    )


class _Comparison:
    """Adds up how far one model's scores are from the reference's."""

    def __init__(self, likelihood: Likelihood, reference: Reference) -> None:
        reference.check_projection(likelihood)
        self._likelihood, self._reference = likelihood, reference
        self._index = self._tokens = self._agreed = 0
        self._total = 0.0

    def add(self, hidden: Tensor) -> None:
        if self._index >= len(self._reference):
            raise ConfigError("against: the reference was made from a shorter text")
        total, agreed = tasks.divergence(
            self._likelihood, hidden, self._reference.read(self._index)
        )
        self._index += 1
        self._tokens += len(hidden)
        self._total += total
        self._agreed += agreed

    @property
    def means(self) -> tuple[float, float]:
        return self._total / self._tokens, self._agreed / self._tokens


def _note(hidden: Tensor, keep: Reference | None, comparison: _Comparison | None) -> None:
    if keep is not None:
        keep.add(hidden)
    if comparison is not None:
        comparison.add(hidden)


def _bar(progress: Progress, what: str, total: int) -> tasks.Step:
    return lambda done: progress(what, done, total)
