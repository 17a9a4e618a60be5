"""How does a Python program get a model that runs within its memory?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fate_moe.config import DEFAULT_POLICY, Size, make_config
from fate_moe.engine.build import build
from fate_moe.engine.prepare import default_cache_dir, find_store
from fate_moe.models.load import load_tokenizer
from fate_moe.types import Progress, no_progress


def load(  # noqa: PLR0913 - a model's options, all of them by name
    model: str = "smolmoe",
    *,
    ram: str | int | Size | None = None,
    experts: str | int | Size | None = None,
    policy: str = DEFAULT_POLICY,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    bits: int | None = None,
    resident: int | None = None,
    progress: Progress = no_progress,
    **settings: object,
) -> tuple[Any, Any]:
    """Load a Mixture-of-Experts model that keeps only part of its experts in memory.

        model, tokenizer = fate_moe.load("Qwen/Qwen1.5-MoE-A2.7B-Chat", ram="6GiB")
        out = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
        print(model.fate.report())

    Set OMP_WAIT_POLICY=PASSIVE before torch is imported: its threads otherwise spin where ours
    compute, and a token takes longer.

    Args:
        model: `smolmoe`, a folder (checkpoint or store), a GGUF file, or a hub id.
        ram: limit for the whole process, `6GiB` or `50%` of what is available.
        experts: limit for the expert slots alone, `2GiB` or `50%` of all experts.
        policy: `tuned` (what measures best), `fate` (the paper's rules), `demand` (load on demand)
            or `resident` (everything in memory).
        cache_dir: where downloads and stores are kept; default `~/.cache/fate`.
        revision: commit, branch or tag of a hub id.
        bits: of the experts' weights: 4, 8, or 16 for experts as they are. None: a store as it is,
            and 4 where one is made.
        resident: bits of the large matrices besides the experts' (attention, shared experts, the
            vocabulary): 4, 8, or 16 for as they are. None: a store as it is, and 16 where one is
            made.
        progress: told about everything that takes long.
        settings: any field of the config's sections, such as `vram="8GiB"` (compute on the GPU),
            `predictor="none"`, `cache="lru"`, `allocation="even"`, `context_tokens=2048`,
            `dtype="float32"`, `io_threads=4`.
    Returns:
        An ordinary transformers model whose `fate` attribute is the `Engine`, and its tokenizer.
    Raises:
        FateError: one line that says what is wrong, what is needed and what to try.
    """
    config = make_config(policy, ram=ram, experts=experts, **settings)
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    store = find_store(
        model, cache_dir=root, revision=revision, bits=bits, resident=resident, progress=progress
    )
    tokenizer = load_tokenizer(store)
    engine = build(store, config, progress=progress)
    return engine.model, tokenizer
