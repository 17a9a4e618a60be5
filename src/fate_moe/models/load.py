"""How is everything but the routed experts loaded?

From a store, through transformers' own `from_pretrained`, with the experts left out. Nothing from
the store can run code: safetensors only, no `trust_remote_code`, and the family comes from
transformers' own table of model types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fate_moe.errors import ModelError
from fate_moe.models.families import REFUSED
from fate_moe.models.kv_cache import kv_growth, most_of, new_cache
from fate_moe.models.quantized import unpack_onto
from fate_moe.models.records import find_records
from fate_moe.models.seam import MoESite, experts_left_out, find_sites

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForTokenClassification",
)
_MAX_CONFIG_BYTES = 1 << 24
_SMALL_BYTES = 1 << 20
_HOST = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model's shape, before any weight is read.

    Attributes:
        config: the transformers config.
        module: the model on the meta device, experts included.
        dtype: what the checkpoint is saved in.
    """

    config: Any
    module: nn.Module
    dtype: torch.dtype

    @property
    def hidden(self) -> int:
        """D, the width of the residual stream."""
        return most_of(self._text, "hidden_size")

    @property
    def vocabulary(self) -> int:
        """V, tokens that the model knows."""
        return most_of(self._text, "vocab_size")

    @property
    def max_context(self) -> int:
        """Most tokens the model was made for."""
        return most_of(self._text, "max_position_embeddings") or 2**20

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        for name in ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"):
            if value := most_of(self._text, name):
                return value
        raise ModelError(
            f"{self.config.model_type}: the config does not say how many experts a token takes"
        )

    def kv_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of key/value cache that a conversation of so many tokens takes, at most."""
        return kv_growth(self.module, dtype)(tokens)

    @property
    def prefills_whole(self) -> bool:
        """Whether a prompt goes through in one piece: its cache takes it in no other way."""
        return new_cache(self.module) is None

    @property
    def mask_rows(self) -> int:
        """Score rows that attention keeps per token of a chunk: one per head where it is eager."""
        eager = not getattr(self.module, "_supports_sdpa", True)
        return 2 * most_of(self._text, "num_attention_heads") if eager else 1

    @property
    def _text(self) -> Any:
        return self.config.get_text_config()


def read_skeleton(folder: Path) -> Skeleton:
    """Build the model of a folder's config.json on the meta device.

    Raises:
        ModelError: no readable config, or a family that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # A config is untrusted input: whatever transformers trips over is the config's fault.
    refusals = (
        ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
        StrictDataclassError, TypeError, ValueError,
    )  # fmt: skip
    try:
        _check_family(folder)
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            module = _auto_class(config).from_config(config)
    except refusals as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}: transformers refuses config.json: {why}") from error
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return Skeleton(config, module, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _auto_class(config: Any) -> Any:
    """Return the first of transformers' auto classes that has a model for this config.

    The text part alone comes first: of a multimodal model that has one, towers for images and
    sound are then neither built nor read.

    Raises:
        ValueError: none has.
    """
    import transformers

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"no language model is made of a {type(config).__name__}")


def _check_family(folder: Path) -> None:
    # A family that transformers has is built by its code; any other would need the folder's own,
    # which transformers offers to run. It is never asked to.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with (folder / "config.json").open("rb") as file:
        fields = json.loads(file.read(_MAX_CONFIG_BYTES))
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ModelError(f"{folder}: model_type {family!r:.80} is unknown to transformers")
    if family in REFUSED:
        raise ModelError(f"{family}: {REFUSED[family]}: not supported; `fate models` lists what is")


def choose_dtype(
    name: str, saved: torch.dtype, natively: bool, on_gpu: bool = False
) -> torch.dtype:
    """Return the dtype to compute in.

    `auto` keeps the checkpoint's type on a GPU; on a processor its 16-bit type only where torch
    computes and the processor multiplies it; elsewhere float32, which is faster there, what the
    native core knows, and a superset. It depends on the machine and the compute path, never on the
    memory budget, so a budget cannot change a token.

    Args:
        name: auto, or the dtype itself.
        saved: the checkpoint's.
        natively: the native core computes what it can.
        on_gpu: a GPU does.
    """
    if name != "auto":
        return DTYPES[name]
    if on_gpu:
        return saved
    if saved is torch.bfloat16 and not natively and _has_native_bfloat16():
        return torch.bfloat16
    return torch.float32


def load_residents(
    folder: Path,
    skeleton: Skeleton,
    dtype: torch.dtype,
    device: torch.device = _HOST,
    *,
    narrow: bool = False,
) -> tuple[Any, list[MoESite]]:
    """Load a store's model without its routed experts.

    Args:
        narrow: large matrices of bfloat16 stay so, and are computed natively in float32.
    Returns:
        The transformers model in eval mode, and its MoE sites in model order.
    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape.
        FormatError: a record is no matrix of the model, or cannot be read.
    """
    records = find_records(folder, skeleton.module, narrow)
    model_class: Any = records.model_class(type(skeleton.module), dtype)
    generation = _generation_config(folder, skeleton)
    with quiet_transformers(), experts_left_out(skeleton.module):
        try:
            model, info = model_class.from_pretrained(
                folder, config=skeleton.module.config, dtype=dtype, output_loading_info=True,
                local_files_only=True, trust_remote_code=False, use_safetensors=True,
                generation_config=generation,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder}: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or () if str(key) not in records.names)
        if keys:
            raise ModelError(
                f"{folder}: {len(keys)} {kind.replace('_', ' ')} in the store, first {keys[0]};"
                " convert the model again"
            )
    own_memory(model, whole=dtype is skeleton.dtype)
    records.load_into(model)
    if device.type != _HOST.type:
        unpack_onto(model, device)
        model.to(device)
    if model.can_generate():
        model.generation_config = generation
    model.eval()
    return model, find_sites(model, skeleton.hidden, dtype, device)


def _generation_config(folder: Path, skeleton: Skeleton) -> Any:
    """Return transformers' defaults with the folder's special tokens, and nothing else of its file.

    The file could ask for beams, guidance or another cache: more memory than was planned, and
    other tokens than the caller asked for. How tokens are chosen is the caller's to say.
    """
    from transformers import GenerationConfig

    fields, config = _read_fields(folder / "generation_config.json"), skeleton.config
    kept = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for said in (fields.get(name), *(getattr(c, name, None) for c in (skeleton._text, config))):
            given = said if isinstance(said, list) else [said]
            ids = [i for i in given if type(i) is int and 0 <= i < skeleton.vocabulary]
            if ids:
                kept[name] = ids if name == "eos_token_id" and len(ids) > 1 else ids[0]
                break
    return GenerationConfig(**kept)


def _read_fields(file: Path) -> dict[str, Any]:
    """Read a small JSON object; what is absent or none is empty."""
    try:
        with file.open("rb") as stream:
            fields = json.loads(stream.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def own_memory(model: nn.Module, *, whole: bool) -> None:
    """Move weights that may be views of a mapped file into memory of their own.

    A mapped file that is cut short kills the process, and its tensors lie at whatever alignment
    the file has, on which the last bits of a matrix product depend.

    Args:
        whole: the large tensors too. They need not move when a cast has copied them already;
            small ones (norms, biases) may be kept in another dtype than the rest.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if whole or tensor.numel() * tensor.itemsize <= _SMALL_BYTES:
                tensor.data = tensor.data.clone()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that lies beside a store.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: no usable tokenizer: {_first_line(error)}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing while the scope lasts: the library is quiet."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _has_native_bfloat16() -> bool:
    # torch has no public question for this; the kernel's list is what oneDNN goes by too.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags or " bf16" in flags


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
