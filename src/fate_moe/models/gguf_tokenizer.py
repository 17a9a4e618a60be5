"""Where does the tokenizer of a GGUF come from?

From the file, built by transformers, where that gives the original's tokens; else from a
`tokenizer.json` beside it. A byte-level vocabulary is cut into words first, in a way that a GGUF
only names (`tokenizer.ggml.pre`): a way that transformers does not know would give other tokens
without a word, so it counts as one that cannot be built. Without any tokenizer there is no store:
transformers would make an empty one of the config alone.
Source: llama.cpp 0c1e57098, src/llama-vocab.cpp (which names mean which cut).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fate_moe.errors import FormatError, ModelError
from fate_moe.models.gguf_metadata import EMBEDDING, Gguf
from fate_moe.models.load import quiet_transformers

_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "chat_template.jinja")  # fmt: skip
_ALONE = "model.gguf"
_MAX_BESIDE_BYTES = 1 << 28
_AS_GPT2 = {"gpt-2", "gpt2", "olmo", "mpt"}
_DIGITS_APART = {"refact", "smollm", "starcoder", "codeshell", "command-r"}  # else as GPT-2
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def write_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Write the tokenizer of a GGUF into `folder`; takes a second or two.

    Raises:
        ModelError: the file has none that can be built, and none lies beside it.
        FormatError: it has more tokens than the model.
    """
    try:
        _build(gguf, folder)
    except ModelError as error:
        _check_beside(gguf, error)
        for name in _BESIDE:
            path = gguf.path.with_name(name)
            if path.is_file():
                _copy(path, folder)


def check_tokenizer(gguf: Gguf) -> None:
    """Find out what can be known without building it.

    Raises:
        ModelError, FormatError: as `write_tokenizer`.
    """
    try:
        _cut(gguf)
    except ModelError as error:
        _check_beside(gguf, error)


def _check_beside(gguf: Gguf, error: ModelError) -> None:
    if not gguf.path.with_name(_BESIDE[0]).is_file():
        raise ModelError(
            f"{error}; put the model's tokenizer.json and tokenizer_config.json beside it"
        ) from error


def _build(gguf: Gguf, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    cut = _cut(gguf)
    try:
        with quiet_transformers(), TemporaryDirectory() as alone:
            # In the GGUF's own folder transformers prefers a tokenizer.json that lies there.
            Path(alone, _ALONE).symlink_to(gguf.path.resolve())
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                alone, gguf_file=_ALONE, local_files_only=True
            )
            if cut is not None:
                tokenizer.backend_tokenizer.pre_tokenizer = cut
            tokenizer.save_pretrained(folder)
    except Exception as error:  # untrusted: whatever fails is the file's fault
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{gguf.path}: transformers refuses its tokenizer: {why}") from error


def _cut(gguf: Gguf) -> Any:
    """Return how words are cut where transformers would do it wrong, None where it is right."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    metadata, lengths = gguf.header.metadata, gguf.header.lengths
    tokens, rows = lengths.get("tokenizer.ggml.tokens", 0), gguf.shape(EMBEDDING)[0]
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind is None or not tokens:
        raise ModelError(f"{gguf.path}: holds no tokenizer")
    if tokens > rows:
        raise FormatError(f"{gguf.path}: {tokens} tokens, {EMBEDDING} has {rows} rows")
    if kind != "gpt2" or name in _AS_GPT2 or name in _known_to_transformers():
        return None
    if name in _DIGITS_APART:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name == "deepseek-v3":
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in _DEEPSEEK_V3]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ModelError(f"{gguf.path}: its tokenizer cuts words as {name!r:.40}, which is unknown")


def _known_to_transformers() -> set[object]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # before 5.23
        return set()
    return set(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _copy(path: Path, folder: Path) -> None:
    if path.stat().st_size > _MAX_BESIDE_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_BESIDE_BYTES} bytes")
    shutil.copyfile(path, folder / path.name)
