"""What does a model think of every next token, without holding all its scores at once?

A causal model of transformers is a body (embedding, layers, last norm) and an output projection,
with whatever the family does to the scores after it (scaling, capping). The body runs on a whole
piece of text; the projection, which makes V numbers per token, on a few tokens at a time. It is the
family's own code: the model runs with a body that hands out given hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate_moe.errors import ModelError
from fate_moe.models.quantized import RecordLinear
from fate_moe.quant.record import RECORD_ALIGN


class Halves:
    """A causal language model taken apart into body and output projection."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model apart; it stays usable.

        Raises:
            ModelError: the family keeps its body under no name that transformers knows.
        """
        self._model = model
        self._name = str(model.base_model_prefix)
        body = model._modules.get(self._name)
        if body is None:
            raise ModelError(
                f"{type(model).__name__}: its layers cannot be told from its output projection; "
                "this family cannot be evaluated"
            )
        self._body: nn.Module = body

    @property
    def projection(self) -> Tensor:
        """What the output projection is made of: weights [V, D], or its codes' bytes [n, 4096].

        A record is never unpacked for it: as floats it may not fit into the plan.
        """
        output = self._model.get_output_embeddings()
        if isinstance(output, RecordLinear) and output.record is not None:
            if output.layout.is_unquantized:
                dtype = getattr(torch, output.layout.dtype)
                return output.record.view(dtype).view(-1, output.in_features)
            return output.record.view(-1, RECORD_ALIGN)
        weight: Tensor = output.weight
        return weight

    @torch.no_grad()
    def hidden(self, ids: Tensor, past: Any = None) -> Tensor:
        """Run the body on tokens [B, T], after `past` if given; returns [B, T, D]."""
        out = self._body(
            input_ids=ids.to(self._model.device), past_key_values=past, use_cache=past is not None
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities [n, V], float32, of last hidden states [n, D]."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        body = self._model._modules[self._name]
        hidden = hidden.to(self._model.device)
        given = MoeModelOutputWithPast(last_hidden_state=hidden[None])
        self._model._modules[self._name] = _Given(given)
        try:
            out = self._model(
                torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device), use_cache=False
            )
        finally:
            self._model._modules[self._name] = body
        return torch.log_softmax(out.logits[0].float(), -1)


class _Given(nn.Module):
    """A body that has run already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output
