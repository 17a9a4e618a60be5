"""Loading, reporting, closing."""

import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

import fate_moe
from fate_moe.engine import Engine, demands
from fate_moe.engine.generate import Conversation, Sampling
from fate_moe.errors import CacheError, ConfigError
from fate_moe.models.load import load_tokenizer
from tests.conftest import Open
from tests.tiny import LAYERS


def readers() -> int:
    return sum(thread.name.startswith("fate-reader") for thread in threading.enumerate())


def test_load_gives_an_ordinary_model_with_a_report(tiny_store: Path) -> None:
    model, tokenizer = fate_moe.load(str(tiny_store), experts="50%", window=4)
    inputs = tokenizer("hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    report = model.fate.report()
    assert report.requests > 0
    assert "hit rate" in str(report)
    model.fate.reset()
    assert model.fate.report().requests == 0
    model.fate.close()


def test_load_makes_a_store_of_the_bits_that_were_asked_for(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for bits, form in ((8, "INT8"), (16, "float32"), (None, "INT4")):
        model, _ = fate_moe.load(str(tiny_checkpoint), bits=bits, cache_dir=tmp_path)
        assert form in model.fate.mode
        model.fate.close()
    with pytest.raises(ConfigError, match="bits: 5 is none of 4, 8, 16"):
        fate_moe.load(str(tiny_checkpoint), bits=5, cache_dir=tmp_path)


def test_a_closed_engine_says_so(tiny_store: Path) -> None:
    model, _ = fate_moe.load(str(tiny_store), experts="50%")
    model.fate.close()
    model.fate.close()
    with pytest.raises(CacheError, match="closed"), torch.no_grad():
        model(torch.arange(3, 9)[None])


def test_a_dropped_model_gives_everything_back(tiny_store: Path) -> None:
    before = readers()
    model, _ = fate_moe.load(str(tiny_store), experts="50%", io_threads=3)
    assert readers() == before + 3
    del model
    gc.collect()
    assert readers() == before


def test_the_slots_of_a_dropped_model_go_with_it(tiny_store: Path) -> None:
    model, _ = fate_moe.load(str(tiny_store), experts="50%")
    mover = weakref.ref(model.fate.mover)  # its finalizer runs while the collector does
    del model
    gc.collect()
    assert mover() is None


def test_every_policy_has_spare_slots_for_what_a_token_asks_for(
    tiny_store: Path, open_engine: Open
) -> None:
    blueprint = open_engine(tiny_store, policy="demand", experts="50%").blueprint
    assert [blueprint.share_out(width)[1] for width in (0, 2, 9)] == [3, 3, 9]
    assert blueprint.skeleton.top_k == 3
    small = open_engine(tiny_store, policy="demand", experts="10%").blueprint
    assert small.share_out(9)[1] == small.memory.slots // 3


def test_a_prompt_says_how_far_it_is(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="50%")
    talk = Conversation(engine, load_tokenizer(tiny_store))
    told: list[tuple[int, int]] = []
    heard: list[int] = []

    def on_prompt(done: int, total: int) -> None:
        told.append((done, total))
        assert not heard

    prompt = "forty letters, more than two pieces long"
    answer = talk.ask(prompt, Sampling(max_new_tokens=4), lambda text: heard.append(1), on_prompt)
    total = answer.prompt_tokens
    assert told == [(total * layer // LAYERS, total) for layer in range(LAYERS)]
    told.clear()
    heard.clear()
    talk.ask(prompt + "!", Sampling(max_new_tokens=2), on_prompt=on_prompt)
    assert told[-1] == (0, 1)  # one new token, and none of the answer's


def test_a_prompt_in_chunks_goes_on_counting(
    tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "SHORT_CHUNK_TOKENS", 16)
    engine = open_engine(tiny_store, experts="50%", context_tokens=64)
    told: list[int] = []
    talk = Conversation(engine, load_tokenizer(tiny_store))
    talk.ask("x" * 40, Sampling(max_new_tokens=2), on_prompt=lambda done, of: told.append(done))
    assert told == [40 * call // (3 * LAYERS) for call in range(3 * LAYERS)]


def test_a_prompt_that_fails_is_told_of_no_more(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="50%")
    talk = Conversation(engine, load_tokenizer(tiny_store))
    told: list[int] = []

    def on_prompt(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        talk.ask("some text", Sampling(max_new_tokens=2), on_prompt=on_prompt)
    talk.ask("some text", Sampling(max_new_tokens=2))
    assert len(told) == 2


def test_a_second_turn_reads_only_what_is_new(tiny_store: Path, open_engine: Open) -> None:
    engine = open_engine(tiny_store, experts="50%")
    tokenizer = load_tokenizer(tiny_store)
    talk = Conversation(engine, tokenizer)
    first = [{"role": "user", "content": "one"}]
    answer = talk.ask(first, Sampling(max_new_tokens=6))
    second = [*first, {"role": "assistant", "content": answer.text},
              {"role": "user", "content": "two"}]  # fmt: skip
    seen: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    continued = talk.ask(second, Sampling(max_new_tokens=6))
    assert seen[0] < continued.prompt_tokens - 5
    fresh = Conversation(engine, tokenizer).ask(second, Sampling(max_new_tokens=6))
    assert continued.token_ids == fresh.token_ids


def test_a_prompt_longer_than_a_chunk_is_split(
    tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fate_moe.models.kv_cache import chunks_continue

    engine = open_engine(tiny_store, experts="50%", context_tokens=128)
    whole = Conversation(engine, load_tokenizer(tiny_store))
    whole = whole.ask("x" * 100, Sampling(max_new_tokens=6))
    monkeypatch.setattr(demands, "SHORT_CHUNK_TOKENS", 32)
    engine = open_engine(tiny_store, experts="50%", context_tokens=128)
    chunk = engine.model.generation_config.prefill_chunk_size
    assert chunk == (32 if chunks_continue(engine.model) else None)
    talk = Conversation(engine, load_tokenizer(tiny_store))
    seen: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    split = talk.ask("x" * 100, Sampling(max_new_tokens=6))
    assert seen[:4] == [25, 25, 25, 25]
    assert split.token_ids == whole.token_ids


def test_a_checkpoint_does_not_say_how_tokens_are_chosen(
    tiny_store: Path, tmp_path: Path, open_engine: Open
) -> None:
    """Only special tokens are taken from generation_config.json, and only those there are."""
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    fields = {
        "guidance_scale": 3.0, "num_beams": 4, "cache_implementation": "static",
        "stop_strings": ["e"], "dola_layers": "high", "use_cache": False, "top_k": 50,
        "repetition_penalty": 2.0, "do_sample": True, "assistant_early_exit": 1,
        "eos_token_id": [256, 10**6, -1, True, "x", 5], "pad_token_id": "pad", "bos_token_id": 3,
    }  # fmt: skip
    plain = ask(open_engine(tiny_store, experts="50%"), tiny_store)
    for hostile in (json.dumps(fields), "[1]", "{", "[" * 10**5):
        (store / "generation_config.json").write_text(hostile)
        engine = open_engine(store, experts="50%")
        assert ask(engine, store) == plain
        kept = engine.model.generation_config
        assert kept.to_diff_dict().keys() <= {
            "bos_token_id", "eos_token_id", "pad_token_id", "prefill_chunk_size",
            "transformers_version",
        }  # fmt: skip
        if hostile[0] == "{" != hostile:
            assert (kept.bos_token_id, kept.eos_token_id) == (3, [256, 5])


def ask(engine: Engine, store: Path) -> tuple[int, ...]:
    talk = Conversation(engine, load_tokenizer(store))
    return talk.ask("one for all", Sampling(max_new_tokens=6)).token_ids


def test_a_family_that_reads_whole_prompts_is_planned_for_them(
    tiny_store: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_moe.engine.demands.SHORT_CHUNK_TOKENS", 32)
    engine = open_engine(tiny_store, experts="50%", context_tokens=256)
    pieces, hidden = engine.blueprint.memory.demands, engine.blueprint.skeleton.hidden
    monkeypatch.setattr("fate_moe.models.load.new_cache", lambda model: None)
    engine = open_engine(tiny_store, experts="50%", context_tokens=256)
    whole = engine.blueprint.memory.demands
    # The hidden states alone of the other tokens: 12 at once, in float32.
    assert whole.workspace_bytes - pieces.workspace_bytes > (256 - 32) * 12 * hidden * 4
    assert whole.kv_bytes == pieces.kv_bytes


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")},
            {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"seed": 2**63}]
)  # fmt: skip
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="need"):
        Sampling(**bad)  # type: ignore[arg-type]
