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
from fate_moe.models.seam import MoESite, experts_left_out, find_sites

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForTokenClassification",
)
_MAX_CONFIG_BYTES = 1 << 24
_SMALL_BYTES = 1 << 20
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
        return int(self._text.hidden_size)

    @property
    def vocabulary(self) -> int:
        """V, tokens that the model knows."""
        return int(self._text.vocab_size)

    @property
    def max_context(self) -> int:
        """Most tokens the model was made for."""
        return int(getattr(self._text, "max_position_embeddings", 2**20))

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        for name in ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"):
            value = getattr(self._text, name, None)
            if isinstance(value, int):
                return value
        raise ModelError(
            f"{self.config.model_type}: the config does not say how many experts a token takes"
        )

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of key/value cache that one token takes over all layers, at most."""
        text = self._text
        heads = int(text.num_attention_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        if getattr(text, "kv_lora_rank", None):  # latent attention, cached expanded
            per_layer = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
        else:
            kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
            per_layer = 2 * kv_heads * head_dim
        return int(text.num_hidden_layers * per_layer * dtype.itemsize)

    @property
    def mask_rows(self) -> int:
        """Score rows that attention keeps per token of a chunk: one per head where it is eager."""
        eager = not getattr(self.module, "_supports_sdpa", True)
        return 2 * int(self._text.num_attention_heads) if eager else 1

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
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
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


def choose_dtype(name: str, saved: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in.

    `auto` keeps the checkpoint's 16-bit type only where the processor multiplies it natively;
    elsewhere float32, which is faster there and a superset. It depends on the machine, never on
    the memory budget, so a budget cannot change a token.
    """
    if name != "auto":
        return DTYPES[name]
    if saved is torch.bfloat16 and _has_native_bfloat16():
        return torch.bfloat16
    return torch.float32


def load_residents(
    folder: Path, skeleton: Skeleton, dtype: torch.dtype
) -> tuple[Any, list[MoESite]]:
    """Load a store's model without its routed experts.

    Returns:
        The transformers model in eval mode, and its MoE sites in model order.
    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape.
    """
    auto = _auto_class(skeleton.config)
    with quiet_transformers(), experts_left_out(skeleton.module):
        try:
            model, info = auto.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True,
                trust_remote_code=False, use_safetensors=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder}: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            first = sorted(str(key) for key in info[kind])[0]
            raise ModelError(
                f"{folder}: {len(info[kind])} {kind.replace('_', ' ')} in the store, first {first};"
                " convert the model again"
            )
    own_memory(model, whole=dtype is skeleton.dtype)
    model.eval()
    return model, find_sites(model, skeleton.hidden, dtype)


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


def chunks_continue(model: Any) -> bool:
    """Say whether transformers' chunked prefill goes on from a cache that holds tokens already.

    5.14 starts over and reads them twice; 5.23 is known to go on.
    """
    from transformers import __version__

    major, minor = (int(part) for part in __version__.split(".")[:2])
    return (major, minor) >= (5, 23) and _takes_dynamic_cache(model)


def new_cache(model: Any) -> Any | None:
    """Make an empty key/value cache; None where the family makes one of its own kind."""
    from transformers import DynamicCache

    if not _takes_dynamic_cache(model):
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _takes_dynamic_cache(model: Any) -> bool:
    # Not public, but it is what `generate` itself goes by.
    return bool(model.can_generate() and model._supports_default_dynamic_cache())


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
