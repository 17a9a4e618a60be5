"""How likely does a model find a text?

The body of the model runs on up to 512 tokens at once, its output projection on 64: memory stays
within the plan that was made for `SCORED_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fate_moe.engine.demands import SHORT_CHUNK_TOKENS
from fate_moe.errors import ConfigError
from fate_moe.models.kv_cache import new_cache
from fate_moe.models.scores import Halves

SCORED_TOKENS = 64


class Likelihood:
    """Scores token sequences with one transformers model, offloaded or not."""

    def __init__(self, model: Any, context_tokens: int, *, together: bool = True) -> None:
        """Bind a model.

        Args:
            context_tokens: longest sequence.
            together: short sequences may share a step; not where one changes another's result.
        """
        self.halves = Halves(model)
        self.step_tokens = min(SHORT_CHUNK_TOKENS, context_tokens) if together else 0
        self._model = model
        self._context_tokens = context_tokens

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """Return the last hidden state of every token, [T, D].

        Raises:
            ConfigError: longer than the context.
        """
        if len(ids) > self._context_tokens:
            raise self._too_long(ids)
        past = None if len(ids) <= SHORT_CHUNK_TOKENS else new_cache(self._model)
        if past is None:  # short, or of a family that reads everything in one piece
            return self.halves.hidden(torch.tensor([list(ids)]))[0]
        whole = torch.empty(0)
        for start in range(0, len(ids), SHORT_CHUNK_TOKENS):
            piece = torch.tensor([list(ids[start : start + SHORT_CHUNK_TOKENS])])
            found = self.halves.hidden(piece, past)[0]
            if not start:  # now its width is known
                whole = found.new_empty(len(ids), found.shape[1])
            whole[start : start + len(found)] = found
        return whole

    def continued(self, ids: Sequence[int], written: int) -> Tensor:
        """Return the hidden states that predict the last `written` tokens, and the last one's.

        What comes before them is read as a prompt, they follow one by one, as in an answer.

        Returns:
            [written + 1, D].
        Raises:
            ConfigError: longer than the context, or nothing comes before them.
        """
        if not 0 < written < len(ids):
            raise ConfigError(
                f"continuation: have {written} tokens of a sequence of {len(ids)}, need at least "
                "one before them"
            )
        if len(ids) > self._context_tokens:
            raise self._too_long(ids)
        past, split = new_cache(self._model), len(ids) - written
        for start in range(0, split, SHORT_CHUNK_TOKENS):
            piece = torch.tensor([list(ids[start : min(start + SHORT_CHUNK_TOKENS, split)])])
            last = self.halves.hidden(piece, past)[0, -1:]
        ones = [self.halves.hidden(torch.tensor([[one]]), past)[0] for one in ids[split:]]
        return torch.cat([last, *ones])

    def _too_long(self, ids: Sequence[int]) -> ConfigError:
        return ConfigError(
            f"a sequence of {len(ids)} tokens, the context takes {self._context_tokens}; "
            "shorten it or raise --context"
        )

    def hidden_of_many(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `hidden`, for several short sequences in one step: [T_i, D] each.

        Padded on the right, where a causal model cannot see it; the padding is routed, though.
        """
        longest = max(len(row) for row in rows)
        if len(rows) == 1 or longest * len(rows) > self.step_tokens:
            return [self.hidden(row) for row in rows]
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        hidden = self.halves.hidden(padded)
        return [one[: len(row)] for one, row in zip(hidden, rows, strict=True)]

    def of_tokens(self, hidden: Tensor, ids: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
        """Score the tokens of a sequence from position `first` on, given what comes before each.

        Args:
            hidden: of the whole sequence, [T, D].
            ids: the sequence.
            first: 1 or later; nothing precedes token 0.
        Returns:
            Log-likelihood [T - first] float32, and whether each token is the likeliest one.
        """
        wanted = torch.tensor(ids[first:], device=hidden.device)
        found, best = [], []
        for start, scores in self.scores(hidden[first - 1 : -1]):
            part = wanted[start : start + len(scores)]
            found.append(scores.gather(1, part[:, None])[:, 0])
            best.append(scores.argmax(1) == part)
        return torch.cat(found), torch.cat(best)

    def scores(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield where each piece starts and its log-probabilities [n, V]."""
        for start in range(0, len(hidden), SCORED_TOKENS):
            yield start, self.halves.log_probabilities(hidden[start : start + SCORED_TOKENS])
