"""How well does a model do on a text, on questions, on passages, on asking for JSON?

Sources of the measures: perplexity of independent sequences; multiple choice by log-likelihood per
character and last-word accuracy as in EleutherAI's lm-evaluation-harness (acc_norm, LAMBADA).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import Choice, LastWord, Questions
from fate_moe.engine.demands import PREFILL_CHUNK_TOKENS
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError

Step = Callable[[int], None]
"""Told how many units (tokens, questions, prompts) are done."""

JSON_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log-likelihood) over `tokens` predicted tokens."""

    perplexity: float
    tokens: int


def sequences(tokenizer: Any, text: str, length: int, most_tokens: int | None) -> list[list[int]]:
    """Cut a text into sequences of `length` tokens, evenly spread when not all are wanted.

    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    ids = [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) == length] or rows[:1]
    if not rows or len(rows[0]) < 2:
        raise ConfigError(f"text: {len(ids)} tokens, need at least 2")
    wanted = len(rows) if most_tokens is None else max(1, min(len(rows), most_tokens // length))
    return [rows[i * len(rows) // wanted] for i in range(wanted)]


def perplexity(
    likelihood: Likelihood,
    rows: Sequence[Sequence[int]],
    step: Step,
    on_hidden: Callable[[Tensor], None] = lambda hidden: None,
) -> Perplexity:
    """Measure perplexity over independent sequences.

    Args:
        on_hidden: receives each sequence's hidden states [T, D], in order.
    """
    total, tokens, done = 0.0, 0, 0
    for row in rows:
        hidden = likelihood.hidden(row)
        on_hidden(hidden)
        found, _ = likelihood.of_tokens(hidden, row, 1)
        total -= found.double().sum().item()
        tokens += len(found)
        done += len(row)
        step(done)
    return Perplexity(math.exp(total / tokens), tokens)


def accuracy(likelihood: Likelihood, tokenizer: Any, questions: Questions, step: Step) -> float:
    """Return the share of questions answered rightly."""
    right = 0
    for done, is_right in enumerate(_judged(likelihood, tokenizer, questions), 1):
        right += is_right
        step(done)
    return right / len(questions)


def _judged(likelihood: Likelihood, tokenizer: Any, questions: Questions) -> Iterator[bool]:
    """Answer questions in order, as many sequences at once as make one step of the model."""
    items = [_Item.of(tokenizer, question) for question in questions]
    while items:
        count = 1
        while count < len(items) and _padded(items[: count + 1]) <= PREFILL_CHUNK_TOKENS:
            count += 1
        group, items = items[:count], items[count:]
        rows = [row for item in group for row in item.rows]
        hidden = iter(likelihood.hidden_of_many(rows))
        for item in group:
            yield item.judge(likelihood, list(islice(hidden, len(item.rows))))


@dataclass(frozen=True, slots=True)
class _Item:
    """A question in tokens: one row per possible answer, and where the answer starts in it."""

    question: Choice | LastWord
    rows: list[list[int]]
    firsts: list[int]

    @classmethod
    def of(cls, tokenizer: Any, question: Choice | LastWord) -> _Item:
        if isinstance(question, Choice):
            context, ends = question.query, [f" {choice}" for choice in question.choices]
        else:
            context, ends = question.context, [question.continuation]
        before = tokenizer(context, verbose=False)["input_ids"]
        rows, firsts = [], []
        for end in ends:
            row = tokenizer(context + end, verbose=False)["input_ids"]
            same = 0  # tokens of the context that the longer text keeps
            while same < min(len(before), len(row) - 1) and before[same] == row[same]:
                same += 1
            rows.append(row)
            firsts.append(max(1, same))
        return cls(question, rows, firsts)

    def judge(self, likelihood: Likelihood, hidden: list[Tensor]) -> bool:
        scored = [
            likelihood.of_tokens(states, row, first)
            for states, row, first in zip(hidden, self.rows, self.firsts, strict=True)
        ]
        if isinstance(self.question, LastWord):
            return bool(scored[0][1].all())
        per_character = [
            found.sum().item() / len(choice)
            for (found, _), choice in zip(scored, self.question.choices, strict=True)
        ]
        return max(range(len(per_character)), key=per_character.__getitem__) == self.question.gold


def _padded(items: Sequence[_Item]) -> int:
    lengths = [len(row) for item in items for row in item.rows]
    return max(lengths) * len(lengths)


def valid_json(engine: Engine, tokenizer: Any, prompts: Sequence[str], step: Step) -> float:
    """Return the share of prompts whose greedy answer holds a whole JSON object or array."""
    valid = 0
    for done, prompt in enumerate(prompts, 1):
        talk = Conversation(engine, tokenizer)
        asked = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
        answer = talk.ask(asked, Sampling(max_new_tokens=JSON_ANSWER_TOKENS))
        valid += holds_json(answer.text)
        step(done)
    return valid / len(prompts)


def holds_json(text: str) -> bool:
    """Say whether the first { or [ of a text begins a whole JSON object or array."""
    starts = [at for at in (text.find("{"), text.find("[")) if at >= 0]
    if not starts:
        return False
    try:
        json.JSONDecoder().raw_decode(text, min(starts))
    except (ValueError, RecursionError):
        return False
    return True


@torch.no_grad()
def divergence(likelihood: Likelihood, mine: Tensor, reference: Tensor) -> tuple[float, int]:
    """Compare two sequences of hidden states [T, D] through the same head.

    Returns:
        Sum of KL(reference, mine) over the T tokens, and how many have the same likeliest token.
    """
    total, agreed = 0.0, 0
    for start, have in likelihood.scores(mine):
        want = likelihood.halves.log_probabilities(reference[start : start + len(have)])
        total += (want.exp() * (want - have)).sum(1).double().sum().item()
        agreed += int((want.argmax(1) == have.argmax(1)).sum())
    return total, agreed
