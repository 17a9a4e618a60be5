"""How well does a model do on a text, on questions, on passages, on asking for JSON?

Sources of the measures: perplexity of independent sequences; multiple choice by log-likelihood per
character and last-word accuracy as in EleutherAI's lm-evaluation-harness (acc_norm, LAMBADA).
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import Choice, LastWord, Questions
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError

Step = Callable[[int], None]
"""Told how many units (tokens, questions, prompts) are done."""

JSON_ANSWER_TOKENS = 96
_PIECE_CHARS = 1 << 16


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(mean negative log-likelihood) over `tokens` predicted tokens."""

    perplexity: float
    tokens: int


def sequences(tokenizer: Any, text: str, length: int, most_tokens: int | None) -> list[list[int]]:
    """Cut a text into sequences of `length` tokens, evenly spread when not all are wanted.

    A shorter rest is left out, unless the whole text is shorter than one sequence.

    Args:
        most_tokens: of all sequences together; None = all of the text.
    Raises:
        ConfigError: the text has fewer than two tokens.
    """
    length = length if most_tokens is None else min(length, most_tokens)
    ids = _tokens(tokenizer, text)
    if len(ids) < 2:
        raise ConfigError(f"text: {len(ids)} tokens, need at least 2")
    whole = max(1, len(ids) // length)
    wanted = whole if most_tokens is None else min(whole, most_tokens // length)
    starts = [i * whole // wanted * length for i in range(wanted)]
    return [list(ids[start : start + length]) for start in starts]


def _tokens(tokenizer: Any, text: str) -> array[int]:
    """Tokenize a text piece by piece: tokenizers need some 150 bytes for every character.

    Pieces end before a space that follows a word, which is where tokenizers split anyway.
    """
    ids = array("i")
    start = 0
    while start < len(text):
        end = min(len(text), start + _PIECE_CHARS)
        if end < len(text):
            cut = end
            while cut > start + 1 and not (text[cut] == " " and text[cut - 1] != " "):
                cut -= 1
            end = cut if cut > start + 1 else end
        piece = tokenizer(text[start:end], add_special_tokens=not start, verbose=False)
        ids.extend(piece["input_ids"])
        start = end
    return ids


def perplexity(
    likelihood: Likelihood,
    rows: Sequence[Sequence[int]],
    step: Step,
    on_hidden: Callable[[Tensor], None] = lambda hidden: None,
    written: int = 0,
) -> Perplexity:
    """Measure perplexity over independent sequences.

    Args:
        on_hidden: receives each sequence's hidden states [T, D], in order; T = 1 + `written` where
            that is given.
        written: only the last tokens of each count, which follow the others one by one; 0 = all.
    """
    total, tokens, done = 0.0, 0, 0
    for row in rows:
        hidden = likelihood.continued(row, written) if written else likelihood.hidden(row)
        on_hidden(hidden)
        found, _ = likelihood.of_tokens(hidden, row[-len(hidden) :], 1)
        total -= found.double().sum().item()
        tokens += len(found)
        done += len(row)
        step(done)
    return Perplexity(math.exp(total / tokens), tokens)


def accuracy(likelihood: Likelihood, tokenizer: Any, questions: Questions, step: Step) -> float:
    """Return the share of questions answered rightly.

    Raises:
        ConfigError: a question is too long for the context, or too short to be scored.
    """
    right = 0
    for done, is_right in enumerate(_judged(likelihood, tokenizer, questions), 1):
        right += is_right
        step(done)
    return right / len(questions)


def _judged(likelihood: Likelihood, tokenizer: Any, questions: Questions) -> Iterator[bool]:
    """Answer questions in order, as many sequences at once as make one step of the model."""
    group: list[_Item] = []
    one_by_one: Iterator[Choice | LastWord] = iter(questions)
    for number, question in enumerate(one_by_one, 1):
        item = _Item.of(tokenizer, question, number)
        if group and _padded([*group, item]) > likelihood.step_tokens:
            yield from _judge(likelihood, group)
            group = []
        group.append(item)
    yield from _judge(likelihood, group)


def _judge(likelihood: Likelihood, group: list[_Item]) -> Iterator[bool]:
    try:
        hidden = iter(likelihood.hidden_of_many([row for item in group for row in item.rows]))
    except ConfigError as error:
        raise ConfigError(f"questions: number {group[0].number}: {error}") from error
    for item in group:
        yield item.judge(likelihood, list(islice(hidden, len(item.rows))))


@dataclass(frozen=True, slots=True)
class _Item:
    """A question in tokens: one row per possible answer, and where the answer starts in it."""

    number: int
    question: Choice | LastWord
    rows: list[list[int]]
    firsts: list[int]

    @classmethod
    def of(cls, tokenizer: Any, question: Choice | LastWord, number: int) -> _Item:
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
            if len(row) < 2:
                raise ConfigError(
                    f"questions: number {number}: {context + end!r:.60} is a single token, need 2 "
                    "or more to score the second; give more context"
                )
            rows.append(row)
            firsts.append(max(1, same))
        return cls(number, question, rows, firsts)

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
        json.JSONDecoder(parse_constant=_no_json).raw_decode(text, min(starts))
    except (ValueError, RecursionError):
        return False
    return True


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON")


@torch.no_grad()
def divergence(likelihood: Likelihood, mine: Tensor, reference: Tensor) -> tuple[float, int]:
    """Compare two sequences of last hidden states [T, D] through the same output projection.

    Returns:
        Sum of KL(reference, mine) over the T tokens, and how many have the same likeliest token.
    """
    total, agreed = 0.0, 0
    for start, have in likelihood.scores(mine):
        want = likelihood.halves.log_probabilities(reference[start : start + len(have)])
        agreed += int((want.argmax(1) == have.argmax(1)).sum())
        distance = have.neg_().add_(want)  # in place: the plan counts four copies of the scores
        total += want.exp_().mul_(distance).sum(1).double().sum().item()
    return total, agreed
