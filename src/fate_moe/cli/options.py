"""Which options do several commands share, and how do they read?"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from fate_moe.config import DEFAULT_POLICY, PRESETS, make_config, parse_size
from fate_moe.errors import ConfigError


def parts_of(text: str, what: str) -> list[str]:
    """Read a list such as `lru,arc`.

    Raises:
        ConfigError: a part is empty or stands twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if "" in parts or len(set(parts)) != len(parts):
        raise ConfigError(f"{what}: {text!r:.80}: need different ones, with commas between")
    return parts


def two_bits(share: str | None) -> dict[str, object]:
    """Read `--int2-share` as settings of `make_config`.

    Raises:
        ConfigError: it is no share.
    """
    if share is None:
        return {}
    return {"int2": "tail", "int2_share": _share(share, "int2-share")}


def in_decode(on_miss: str | None, bias: float | None, exact: bool) -> dict[str, object]:
    """Read `--int2-on-miss`, `--routing-bias` and `--exact` as settings of `make_config`.

    Raises:
        ConfigError: one is bad, or they exclude each other.
    """
    settings: dict[str, object] = {"exact": exact, "routing_bias": bias}
    if on_miss is not None:
        settings["int2_on_miss"] = _share(on_miss, "int2-on-miss")
    make_config(DEFAULT_POLICY, **settings)  # before a model is loaded or fetched
    return settings


def _share(text: str, what: str) -> float:
    found = parse_size(text, what).share
    if found is None:
        raise ConfigError(f"{what}: {text!r:.40}: need a share such as 25%")
    return found


def _policies_own(setting: str) -> str:
    """Say what a setting is where only --policy is chosen."""
    policies: dict[str, list[str]] = {}
    for policy in PRESETS:
        policies.setdefault(attrgetter(setting)(make_config(policy)), []).append(policy)
    listed = ", ".join(f"{name} ({', '.join(chosen)})" for name, chosen in policies.items())
    return f" Default: the policy's: {listed}."


MEMORY, STAGES, ANSWER = "Memory", "Stages", "Answer"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smolmoe (built in), a folder with a checkpoint or a store, a GGUF file, or a hub id "
        "(owner/name).",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=MEMORY,
        help="Limit for the whole process: 6GiB, 800MiB or 50% of what is available. "
        "Default: 75% of it.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=MEMORY,
        help="Compute on the GPU and take at most this much of its memory: 8GiB, or 50% of what is "
        "free. Default: no GPU.",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|N%",
        rich_help_panel=MEMORY,
        help="Limit for the expert slots alone: 2GiB, or 25% of all experts.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=MEMORY,
        help="Prompt and answer together. Default: the model's limit, at most 4096.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        rich_help_panel=STAGES,
        help="tuned (what measures best), fate (the paper's rules), path (experts of the most "
        "similar request), demand (load on demand), resident (everything in memory).",
    ),
]
PredictorName = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        rich_help_panel=STAGES,
        help="ridge (fitted by fate calibrate, else as "
        "cross_layer), cross_layer (the paper's), path, history, or none."
        + _policies_own("predict.predictor"),
    ),
]
CacheName = Annotated[
    str | None,
    typer.Option(
        "--cache",
        rich_help_panel=STAGES,
        help="transition, arc (the paper's), lru, lfu, lfru, s3fifo or guarded."
        + _policies_own("cache.cache"),
    ),
]
AllocationName = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        rich_help_panel=STAGES,
        help="shallow (the paper's), even or global." + _policies_own("cache.allocation"),
    ),
]
Percentile = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        rich_help_panel=STAGES,
        help="Guess the router's top-k and every expert at or above this percentile. Default: 75.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=STAGES,
        help="Most guesses per layer, always made. Default: as many as the measured computing time "
        "hides, and only while they pay.",
    ),
]
Compute = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STAGES,
        help="auto, native, triton or eager. native: compiled kernels, activations in 8 bits. "
        "triton: kernels on a GPU. eager: torch, the reference. auto: triton on a GPU, else native "
        "where it was built.",
    ),
]
Int2Share = Annotated[
    str | None,
    typer.Option(
        "--int2-share",
        metavar="P%",
        rich_help_panel=STAGES,
        help="In prompts, read and compute the least popular experts in two bits, up to this share "
        "of the routed tokens: fewer bytes, not the same output. Default: none.",
    ),
]
Int2OnMiss = Annotated[
    str | None,
    typer.Option(
        "--int2-on-miss",
        metavar="P%",
        rich_help_panel=STAGES,
        help="While an answer is written, read and compute an expert in two bits where it is not "
        "in memory and has less than this share of the token's router weights: fewer bytes, and an "
        "answer that depends on what is in memory. About 100% over the experts per token and a "
        "little more, as 17% for smolmoe; `requests` counts them. Default: none.",
    ),
]
RoutingBias = Annotated[
    float | None,
    typer.Option(
        "--routing-bias",
        metavar="X",
        rich_help_panel=STAGES,
        help="While an answer is written, add this to the router's logits of the experts that are "
        "in memory before it takes the k largest: fewer misses, and an answer that depends on what "
        "is in memory. Only for routers that take a softmax. Begin with little, as 0.01 for "
        "smolmoe; `requests` counts whom it changed. Default: 0.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        rich_help_panel=STAGES,
        help="The answer does not depend on what is in memory, and `mode` says so: the default; "
        "refuses --int2-on-miss and --routing-bias. (--int2-share does not depend on it.)",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STAGES,
        help="auto, float32, bfloat16 or float16. auto: float32; with eager, bfloat16 where the "
        "processor has it; on a GPU the checkpoint's own.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=STAGES, help="Computing threads of torch."),
]
IoThreads = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=STAGES, help="Reads side by side. Default: 4."),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify",
        rich_help_panel=STAGES,
        help="Check each expert against its checksum when it is first read.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Commit, branch or tag of a hub id."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where downloads and stores are kept. Default: $FATE_CACHE or ~/.cache/fate.",
    ),
]
JsonOut = Annotated[
    bool,
    typer.Option("--json", help="Print exactly one JSON object on stdout."),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", metavar="N", rich_help_panel=ANSWER, help="Longest answer."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(rich_help_panel=ANSWER, help="0 takes the likeliest token (greedy)."),
]
TopP = Annotated[
    float,
    typer.Option(rich_help_panel=ANSWER, help="Sample from this share of the probability."),
]
Seed = Annotated[
    int | None, typer.Option(rich_help_panel=ANSWER, help="Makes sampling repeatable.")
]
System = Annotated[
    str | None,
    typer.Option(rich_help_panel=ANSWER, help="System message before the conversation."),
]
