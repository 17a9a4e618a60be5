"""Does a family run as in plain transformers, to the bit?

Asks transformers which families there are, builds one at tiny size with random weights, saves it as
its models are published, converts it, and compares the engine with plain `eager` experts.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from fate_moe.config import make_config
from fate_moe.engine import Engine, build
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.engine.prepare import convert_model
from fate_moe.models.kv_cache import kv_growth, new_cache, tensors_of
from fate_moe.models.load import load_tokenizer, quiet_transformers
from fate_moe.models.seam import UNDECORATED, find_experts
from fate_moe.quant.codec import decode
from fate_moe.quant.record import RecordLayout
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import FileReader
from fate_moe.types import ExpertKey
from tests.families.tiny_config import tiny_config
from tests.tiny import make_tokenizer

# What a model of the family is saved by: towers for images and sound included.
WHOLE = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM",
         "AutoModelForTokenClassification")  # fmt: skip
TEXT = ("AutoModelForCausalLM", *WHOLE)
MODELS = Path(transformers.__file__).parent / "models"
PROMPT_TOKENS, NEW_TOKENS = 11, 5
PROMPTS = "one for all", "one for me"


@dataclass(frozen=True)
class Outcome:
    """What was seen of one family.

    Attributes:
        model_type: as in config.json.
        predictor: "cross_layer", "history", or "both" where only some routers can be asked ahead.
        moe_layers: of the tiny model.
        generates: greedy generation was compared, too.
    """

    model_type: str
    predictor: str
    moe_layers: int
    generates: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sources(decorated: bool) -> Iterator[str]:
    """Name the modules of transformers with routed experts, on its experts interface or not."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        is_decorated = "@use_experts_implementation" in text or any(
            f"class {name}(" in text for name in UNDECORATED
        )
        is_moe = "self.experts = " in text or is_decorated
        if is_moe and is_decorated == decorated:
            yield file.parent.name


def model_types(decorated: bool = True) -> list[str]:
    """List the model types of those modules that a model can be built of, in order."""
    wanted = set(sources(decorated))
    return sorted(
        model_type
        for model_type in CONFIG_MAPPING_NAMES
        if model_type_to_module_name(model_type) in wanted and auto_class(model_type, TEXT)
    )


def auto_class(model_type: str, names: tuple[str, ...]) -> Any:
    """Return the first auto class that has a model for the type, or None."""
    for name in names:
        auto = getattr(transformers, name, None)
        if auto is not None and CONFIG_MAPPING[model_type] in auto._model_mapping:
            return auto
    return None


def save_published(model_type: str, folder: Path) -> None:
    """Write a random model in bfloat16, with weights that make routing vary."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        # Vectors stay as the family draws them: the same in every run, for a state-space layer that
        # goes on from what it has read differs in the last bits, and with some of them in a token.
        torch.manual_seed(3)
        model = auto_class(model_type, WHOLE).from_config(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                spread = 2 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)


def plain(model_type: str, folder: Path) -> Any:
    """Load the checkpoint in plain transformers, in float32, with the family's own experts."""
    auto = auto_class(model_type, TEXT)
    with quiet_transformers():
        model = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


def generates(model: Any) -> bool:
    """Whether the model makes one token after another."""
    return bool(model.can_generate()) and "diffusion" not in model.config.model_type


def check_family(model_type: str, work: Path) -> Outcome:
    """Compare engine and plain transformers, unquantized and in INT4; raises where they differ."""
    checkpoint = work / "checkpoint"
    save_published(model_type, checkpoint)
    make_tokenizer().save_pretrained(checkpoint)
    reference = plain(model_type, checkpoint)
    for bits in (16, 4):
        store = work / f"store-{bits}"
        convert_model(str(checkpoint), store, cache_dir=work, bits=bits)
        if bits == 4:
            put_back(store, reference)
        outcome = compare(model_type, store, reference)
        shutil.rmtree(store)
    return outcome


def compare(model_type: str, store: Path, reference: Any) -> Outcome:
    config = make_config(
        experts="30%",
        allocation="even",
        window=4,
        compute="eager",
        dtype="float32",
        context_tokens=64,
    )
    engine = build(store, config)
    try:
        same_logits(engine.model, reference)
        if generates(reference):
            same_answers(engine, reference, load_tokenizer(store))
        room_for_what_is_cached(engine, reference)
        report = engine.report()
        assert report.misses > 0
        # Slots were used again: by what the policy evicted, or by guess after guess.
        slots = engine.blueprint.memory.slots
        assert report.evictions > 0 or report.misses + report.guesses > slots
        layers, blind = (
            len(engine.blueprint.manifest.layers),
            sum(router is None for router in engine.routers),
        )
        # A model of one MoE layer has no next one; history guesses nothing in the first step.
        assert report.recall or layers == 1 or (blind and not generates(reference))
    finally:
        engine.close()
    predictor = {0: "cross_layer", layers: "history"}.get(blind, "both")
    return Outcome(model_type, predictor, layers, generates(reference))


@torch.no_grad()
def same_logits(model: Any, reference: Any) -> None:
    ids = torch.randint(3, 250, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    have, want = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert torch.isfinite(want).all()
    assert torch.equal(have, want), f"logits differ by {(have - want).abs().max()}"


def same_answers(engine: Engine, reference: Any, tokenizer: Any) -> None:
    """Compare greedy answers: to a prompt, to one that begins like it, and to the next turn.

    Once more with prompts in pieces: a family whose code cannot go on from what it has read must
    not be asked to.
    """
    want = cache(partial(plain_answer, reference))
    for chunk_tokens in (engine.chunk_tokens, 4):
        with patch.object(Engine, "chunk_tokens", chunk_tokens):
            talk = Conversation(engine, tokenizer)
            for prompt in PROMPTS:
                ids = tokenizer(prompt)["input_ids"]
                answer = same_answer(talk, prompt, ids, want)
            # Tokens, for a random model's answer need not read back as the same ones.
            longer = [*ids, *answer, *tokenizer(" and so on")["input_ids"]]
            with patch.object(talk, "_encode", return_value=longer):
                same_answer(talk, "the next turn", longer, want)


def same_answer(
    talk: Conversation, prompt: str, ids: list[int], want: Callable[[tuple[int, ...]], list[int]]
) -> list[int]:
    """Compare one greedy answer, return its tokens."""
    have = list(talk.ask(prompt, Sampling(max_new_tokens=NEW_TOKENS)).token_ids)
    assert have == want(tuple(ids)), f"answers differ to {prompt!r}"
    return have


@torch.no_grad()
def plain_answer(reference: Any, ids: tuple[int, ...]) -> list[int]:
    tokens = torch.tensor([ids])
    answer: list[int] = reference.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[0, len(ids) :].tolist()  # fmt: skip
    return answer


@torch.no_grad()
def room_for_what_is_cached(engine: Engine, reference: Any) -> None:
    """Hold the planned bytes of the cache against what it holds."""
    model, skeleton = engine.model, engine.blueprint.skeleton
    growth = kv_growth(skeleton.module, model.dtype)
    for tokens in (PROMPT_TOKENS, 2 * PROMPT_TOKENS, 5 * PROMPT_TOKENS):
        held = new_cache(model)
        ids = torch.arange(3, 3 + tokens)[None]
        out = model(input_ids=ids, past_key_values=held, use_cache=True)
        if held is None and generates(reference):
            held = out.past_key_values
        have = sum(tensor.nbytes for tensor in tensors_of(held))
        planned = growth(tokens)
        assert have <= planned <= 4 * have, f"{tokens} tokens: {have} held, {planned} planned"


def put_back(store: Path, model: Any) -> None:
    """Give a plain model the weights that a store's records hold."""
    manifest = read_manifest(store)
    reader = FileReader(store, manifest)
    experts = find_experts(model)
    with torch.no_grad():
        for index, layer in enumerate(manifest.layers):
            layout = RecordLayout.from_json(layer.layout)
            for expert in range(layer.num_experts):
                record = torch.empty(layer.record_bytes, dtype=torch.uint8)
                reader.read_into(ExpertKey(index, expert), memoryview(record.numpy()))
                for name, weight in decode(layout, record, torch.float32).items():
                    target = getattr(experts[layer.path], name)[expert]
                    flip = layer.transposed and weight.ndim == 2
                    target.copy_(weight.mT if flip else weight)
    reader.close()
