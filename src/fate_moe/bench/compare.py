"""What does each precision cost, side by side, against the model's own weights?

Settings run one after the other, each within the same memory limits; only files lie between them.
The reference, the unquantized experts, runs first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fate_moe.bench.evaluate import Evaluation, Reference, Tasks, evaluate
from fate_moe.bench.likelihood import SCORED_TOKENS
from fate_moe.config import DEFAULT_POLICY, Config, make_config, parse_size
from fate_moe.engine.build import build
from fate_moe.engine.prepare import find_store, give_memory_back
from fate_moe.errors import ConfigError, StoreError
from fate_moe.models.load import load_tokenizer
from fate_moe.store.format import is_store
from fate_moe.types import Progress


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model's experts are stored and computed.

    Attributes:
        bits: of the store; None = whatever the store has.
        fitted: scales fitted (True) or plain min-max.
        int2: which experts are computed from two bits.
        int2_share: most tokens of a prompt that the tail of them takes.
        int2_on_miss, routing_bias: of decode, see `ComputeConfig`.
        says: what the table's reader should know.
    """

    bits: int | None
    fitted: bool = True
    int2: str = "never"
    int2_share: float = 0.25
    int2_on_miss: float = 0.0
    routing_bias: float = 0.0
    says: str = ""


AS_STORED = Setting(None)
ORIGINAL = "original"
SETTINGS = {
    ORIGINAL: Setting(16, says="the checkpoint's own weights: the reference"),
    "int8": Setting(8, says="8 bits"),
    "int4": Setting(4, says="4 bits, balanced, fitted scales: what fate convert makes"),
    "int4-minmax": Setting(4, fitted=False, says="4 bits, plain min-max scales"),
    "int2": Setting(4, int2="always", says="the high 2 bits of the 4-bit experts"),
    "hybrid": Setting(4, int2="tail", says="in prefill the least popular experts in 2 bits"),
}
WITH_VALUE = "hybrid@10%", "on-miss@17%", "bias@0.01"
"""Examples of settings that need, or may have, a value."""


@dataclass(frozen=True, slots=True)
class Models:
    """Where the settings' stores come from and within which limits they run.

    Attributes:
        model: name, as for `fate_moe.load`; no store.
        cache_dir: where stores are kept.
        revision: of a hub id.
        policy: preset of the engine.
        settings: further settings of `make_config`, such as ram or experts.
    """

    model: str
    cache_dir: Path
    revision: str | None = None
    policy: str = DEFAULT_POLICY
    settings: Mapping[str, object] | None = None


def setting_of(name: str) -> Setting:
    """Return the setting of a name; `hybrid@10%` is hybrid with that share of the tokens.

    `on-miss@17%` and `bias@0.01` are `int4` with int2_on_miss and routing_bias.

    Raises:
        ConfigError: there is none.
    """
    if name in SETTINGS:
        return SETTINGS[name]
    base, _, text = name.partition("@")
    if base == "hybrid":
        share = _share(name, text)
        says = f"in prefill the least popular experts, up to {share:.0%} of the tokens, in 2 bits"
        return replace(SETTINGS["hybrid"], int2_share=share, says=says)
    if base == "on-miss":
        share = _share(name, text)
        says = f"in decode, what misses and weighs below {100 * share:g}%, in 2 bits"
        return Setting(4, int2_on_miss=share, says=says)
    if base == "bias":
        try:
            bias = make_config(routing_bias=float(text)).compute.routing_bias
        except (ValueError, ConfigError):
            raise ConfigError(f"compare: {name!r:.40}: need a number such as bias@0.01") from None
        says = f"in decode, logits of experts in memory raised by {bias:g}"
        return Setting(4, routing_bias=bias, says=says)
    raise ConfigError(f"compare: {name!r:.40} is none of {', '.join((*SETTINGS, *WITH_VALUE))}")


def _share(name: str, text: str) -> float:
    share = parse_size(text, f"compare: {name!r:.40}").share
    if share is None:
        example = next(one for one in WITH_VALUE if one.startswith(name.partition("@")[0]))
        raise ConfigError(f"compare: {name!r:.40}: need a share such as {example}")
    return share


def check_names(names: Sequence[str], is_written: bool) -> None:
    """Check names of settings.

    Args:
        is_written: whether anything is written token by token, after a prompt.
    Raises:
        ConfigError: one is unknown, or stands twice, or there is none; or would change nothing.
    """
    for name in names:
        setting = setting_of(name)
        if (setting.int2_on_miss or setting.routing_bias) and not is_written:
            raise ConfigError(
                f"compare: {name} concerns what is written, not prompts; add --continuation N or "
                "--json-prompts"
            )
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"compare: need different names out of {', '.join(SETTINGS)}")


def compare(
    models: Models, names: Sequence[str], wanted: Tasks, progress: Progress
) -> dict[str, Evaluation]:
    """Evaluate one model with several settings.

    Args:
        names: keys of SETTINGS; `original` is always added, as the first.
    Returns:
        Evaluations by name, the reference first.
    Raises:
        ConfigError: unknown names; FateError: as `fate_moe.load` and `evaluate`.
    """
    check_names(names, bool(wanted.written_tokens or wanted.json_prompts))
    found = {}
    with scratch_folder(models) as folder:
        reference = Reference(folder)
        for name in (ORIGINAL, *(name for name in names if name != ORIGINAL)):
            is_first = name == ORIGINAL
            found[name] = run_one(
                models,
                setting_of(name),
                wanted,
                against=None if is_first else reference,
                keep=reference if is_first else None,
                progress=_prefixed(progress, name),
            )
    return found


def evaluate_one(
    models: Models, wanted: Tasks, against: str | None, scratch: Path, progress: Progress
) -> Evaluation:
    """Evaluate a model as it is stored, against a reference if one is named.

    Args:
        against: a store of the same model, its checkpoint (taken unquantized), or `original`, the
            checkpoint that `models` names.
        scratch: an empty folder for the reference's hidden states, 4 D bytes a token.
    Raises:
        ConfigError: the reference has another head; FateError: as `fate_moe.load`.
    """
    reference = None
    if against is not None:
        if wanted.text is None:
            raise ConfigError("against: it compares on a text; give --text")
        reference = Reference(scratch)
        name = models.model if against == ORIGINAL else against
        is_stored = against != ORIGINAL and is_store(Path(name).expanduser())
        run_one(
            replace(models, model=name),
            AS_STORED if is_stored else SETTINGS[ORIGINAL],
            Tasks(wanted.text, wanted.sequence_tokens, wanted.most_tokens, wanted.written_tokens),
            against=None,
            keep=reference,
            progress=_prefixed(progress, "reference"),
        )
    return run_one(models, AS_STORED, wanted, against=reference, keep=None, progress=progress)


@contextmanager
def scratch_folder(models: Models) -> Iterator[Path]:
    """Make a folder beside the stores, on disk: /tmp may be memory that no plan counts.

    Raises:
        StoreError: the cache folder cannot be written.
    """
    try:
        models.cache_dir.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".eval-", dir=models.cache_dir)
    except OSError as error:
        raise StoreError(f"{models.cache_dir}: cannot be written: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def run_one(
    models: Models,
    setting: Setting,
    wanted: Tasks,
    *,
    against: Reference | None,
    keep: Reference | None,
    progress: Progress,
) -> Evaluation:
    """Load a model with one setting, evaluate it, and give everything back."""
    config = make_config(
        models.policy,
        **{
            "int2": setting.int2,
            "int2_share": setting.int2_share,
            "int2_on_miss": setting.int2_on_miss,
            "routing_bias": setting.routing_bias,
            "scored_tokens": SCORED_TOKENS,
            **(models.settings or {}),
        },
    )
    store = find_store(
        models.model,
        cache_dir=models.cache_dir,
        revision=models.revision,
        bits=setting.bits,
        fitted=setting.fitted,
        progress=progress,
    )
    try:
        return _measure(store, config, wanted, against=against, keep=keep, progress=progress)
    finally:
        give_memory_back()  # the next setting's plan starts from what this process holds


def _measure(
    store: Path,
    config: Config,
    wanted: Tasks,
    *,
    against: Reference | None,
    keep: Reference | None,
    progress: Progress,
) -> Evaluation:
    tokenizer: Any = load_tokenizer(store)
    engine = build(store, config, progress=progress)
    try:
        return evaluate(engine, tokenizer, wanted, against=against, keep=keep, progress=progress)
    finally:
        engine.close()


def _prefixed(progress: Progress, name: str) -> Progress:
    return lambda what, done, total: progress(f"{name}: {what}", done, total)
