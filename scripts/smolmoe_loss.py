"""How far is the student from its dense base model? What the training goes down."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD_ROWS = {"cpu": 256, "cuda": 4096}  # tokens whose logits are held at once


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """Product [t, V] in the head's type, its sums in float32: bfloat16 logits would be noise."""
    hidden = hidden.to(head.dtype)
    if head.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()


@torch.no_grad()
def divergence(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher, student) over tokens, and its gradient with respect to `student`.

    Args:
        student, teacher: last hidden states [T, D].
        head: output projection [V, D], the same for both.
    The gradient is made by hand, a few tokens at a time: 200 kB of logits each, twice.
    """
    gradient = torch.empty_like(student)
    total = torch.zeros((), dtype=torch.float64, device=head.device)
    rows = HEAD_ROWS[head.device.type]
    for start in range(0, len(student), rows):
        part = slice(start, start + rows)
        wanted = torch.log_softmax(logits_of(teacher[part], head), -1)
        have = torch.log_softmax(logits_of(student[part], head), -1)
        probability = wanted.exp()
        total += (probability * (wanted - have)).sum()
        gradient[part] = have.exp_().sub_(probability).to(head.dtype) @ head
    return total / len(student), gradient / len(student)


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Perplexity over independent sequences, rows [B, T] on the model's device.

    Not fate_moe.bench's, whose tokens lie on the CPU: this one also runs on a CUDA card.
    """
    total = 0.0
    for part in rows.split(2):
        logits = model(part).logits[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows[:, 1:].numel())
