"""What may the user choose, and what do the choices mean?

Frozen dataclasses, one section per stage, checked once when they are made. Names of policies are
checked against the tables by `engine/build`, which alone knows them. Nothing here reads the
environment or a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace

from fate_moe.errors import ConfigError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_BYTES = 2**60
DEFAULT_POLICY = "tuned"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*")


@dataclass(frozen=True, slots=True)
class Size:
    """An amount of memory: bytes, or a share in [0, 1] of something named by the option."""

    count_bytes: int | None = None
    share: float | None = None

    def of(self, whole_bytes: int) -> int:
        """Return this size in bytes, where 100 % is `whole_bytes`."""
        if self.count_bytes is not None:
            return self.count_bytes
        return int(whole_bytes * (self.share or 0.0))


def parse_size(text: str | int | Size, what: str = "size") -> Size:
    """Read `512MiB`, `6GiB`, `1.5 GB`, `50%` or a plain number of bytes.

    Raises:
        ConfigError: the text is none of these, or over 100 %.
    """
    if isinstance(text, Size):
        return text
    match = _SIZE.fullmatch(str(text))
    unit = match.group(2).upper() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"{what}: cannot read {str(text)!r}; write 512MiB, 6GiB or 50%")
    number = float(match.group(1))
    if unit != "%":
        if number * _UNITS[unit] > _MOST_BYTES:
            raise ConfigError(f"{what}: {text!s:.40} is more than any machine has")
        return Size(count_bytes=int(number * _UNITS[unit]))
    if number > 100:
        raise ConfigError(f"{what}: {text} is over 100%")
    return Size(share=number / 100)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: `4.6 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """WHICH NEXT? `percentile`: experts scored at or above it join the router's own top-k."""

    predictor: str = "ridge"
    percentile: float = 75.0

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"percentile: have {self.percentile}, need 0 to 100")


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """MOVE EARLY. `window`: most guesses per layer; None = what the measured time allows."""

    io_threads: int = 4
    direct: bool = True
    verify: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.io_threads <= 64:
            raise ConfigError(f"io_threads: have {self.io_threads}, need 1 to 64")
        if self.window is not None and self.window < 0:
            raise ConfigError(f"window: have {self.window}, need 0 or more")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """WHICH STAY? `shallow_layers`: how many first layers the shallow allocation keeps whole."""

    cache: str = "transition"
    allocation: str = "even"
    shallow_layers: int = 4

    def __post_init__(self) -> None:
        if self.shallow_layers < 0:
            raise ConfigError(f"shallow_layers: have {self.shallow_layers}, need 0 or more")


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """RUN THEM.

    Attributes:
        compute: native (compiled kernels, activations in eight bits), triton (kernels on a GPU),
            eager (torch, the reference) or auto: triton on a GPU, else native, as far as there are.
        dtype: auto, float32, bfloat16 or float16.
        threads: None = torch's choice.
        int2: which experts are computed from two bits: never, tail (in prefill, the least popular
            ones) or always.
        int2_share: most tokens of a step, as a share of 1, that the tail may take.
        int2_on_miss: in decode, chosen experts whose share of a token's router weights is below
            this, as a share of 1, are computed from two bits where not all of them is in memory.
        routing_bias: in decode, added to the router's logits of experts that are in memory.
        exact: nothing is chosen by what is in memory; forbids int2_on_miss and routing_bias.
    """

    compute: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    int2: str = "never"
    int2_share: float = 0.25
    int2_on_miss: float = 0.0
    routing_bias: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.compute not in {"auto", "native", "triton", "eager"}:
            raise ConfigError(f"compute: {self.compute!r} is none of auto, native, triton, eager")
        if self.dtype not in {"auto", "float32", "bfloat16", "float16"}:
            raise ConfigError(f"dtype: {self.dtype!r} is none of auto, float32, bfloat16, float16")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"threads: have {self.threads}, need 1 to 1024")
        if not 0 <= self.int2_share <= 1:
            raise ConfigError(f"int2_share: have {self.int2_share}, need 0 to 1")
        if not 0 <= self.int2_on_miss <= 1:
            raise ConfigError(f"int2_on_miss: have {self.int2_on_miss}, need 0 to 1")
        if not 0 <= self.routing_bias < math.inf:
            raise ConfigError(f"routing_bias: have {self.routing_bias}, need 0 or more")
        if self.exact and self.int2_on_miss:
            raise self._is_not_exact(f"int2_on_miss {100 * self.int2_on_miss:g}%", "--int2-on-miss")
        if self.exact and self.routing_bias:
            raise self._is_not_exact(f"routing_bias {self.routing_bias:g}", "--routing-bias")

    @staticmethod
    def _is_not_exact(what: str, option: str) -> ConfigError:
        return ConfigError(
            f"exact: with {what} the answer would depend on what is in memory; leave out one of "
            f"--exact and {option}"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How much memory and context the run may take.

    Attributes:
        ram: the whole process; None = three quarters of what is available now.
        vram: all that the process takes of a GPU; None = no GPU.
        experts: expert slots alone; None = what `ram`, or on a GPU `vram`, leaves.
        context_tokens: prompt and answer together; None = the model's limit, at most 4096.
        scored_tokens: tokens whose scores over the vocabulary are held at once.
    """

    ram: Size | None = None
    vram: Size | None = None
    experts: Size | None = None
    context_tokens: int | None = None
    scored_tokens: int = 1

    def __post_init__(self) -> None:
        if self.context_tokens is not None and self.context_tokens < 1:
            raise ConfigError(f"context: have {self.context_tokens} tokens, need 1 or more")
        if self.scored_tokens < 1:
            raise ConfigError(f"scored_tokens: have {self.scored_tokens}, need 1 or more")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a run depends on besides the model and the prompt."""

    policy: str = DEFAULT_POLICY
    predict: PredictConfig = field(default_factory=PredictConfig)
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    limits: Limits = field(default_factory=Limits)


_SECTIONS = ("predict", "prefetch", "cache", "compute", "limits")

# What a policy's name fixes; every other setting keeps its default or the user's choice.
PRESETS: dict[str, dict[str, object]] = {
    "tuned": {},
    "fate": {"predictor": "cross_layer", "cache": "arc", "allocation": "shallow"},
    "path": {"predictor": "path"},
    "demand": {"predictor": "none"},
    # Nobody is evicted there: the cache that costs least.
    "resident": {
        "predictor": "none",
        "cache": "lru",
        "allocation": "even",
        "experts": Size(share=1.0),
    },
}


def make_config(policy: str = DEFAULT_POLICY, **settings: object) -> Config:
    """Build a config from flat settings (`cache="lru"`, `ram="6GiB"`); None means not chosen.

    Raises:
        ConfigError: unknown policy or setting, bad value, or a setting the policy forbids.
    """
    if policy not in PRESETS:
        raise ConfigError(f"policy: {policy!r} is none of {', '.join(sorted(PRESETS))}")
    chosen = {name: value for name, value in settings.items() if value is not None}
    if policy == "resident" and "experts" in chosen:
        raise ConfigError("experts: policy resident keeps all of them; leave --experts out")
    for name in ("ram", "vram", "experts"):
        if name in chosen:
            chosen[name] = parse_size(chosen[name], name)  # type: ignore[arg-type]
    chosen = {**PRESETS[policy], **chosen}
    config = Config(policy=policy)
    for section in _SECTIONS:
        part = getattr(config, section)
        own = {f.name: chosen.pop(f.name) for f in fields(part) if f.name in chosen}
        config = replace(config, **{section: replace(part, **own)})
    if chosen:
        raise ConfigError(f"unknown setting: {', '.join(sorted(chosen))}")
    return config
