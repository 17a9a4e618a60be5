"""Does every measure equal what its definition gives on whole logits?"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fate_moe.bench import likelihood as likelihoods
from fate_moe.bench import tasks
from fate_moe.bench.evaluate import Evaluation, Reference, Tasks, evaluate
from fate_moe.bench.likelihood import Likelihood
from fate_moe.bench.sets import Choice, LastWord
from fate_moe.engine.generate import Conversation
from fate_moe.engine.handle import Engine
from fate_moe.errors import ConfigError, StoreError
from fate_moe.models.load import load_tokenizer
from fate_moe.models.scores import Halves
from fate_moe.types import no_progress
from tests.conftest import Open

TEXT = "The harbour at the end of the road had not changed much in forty years. " * 4


@pytest.fixture
def engine(tiny_store: Path, open_engine: Open) -> Engine:
    return open_engine(tiny_store, experts="50%", scored_tokens=64)


@pytest.fixture
def tokenizer(tiny_store: Path) -> Any:
    return load_tokenizer(tiny_store)


def whole_scores(engine: Engine, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(engine.model(torch.tensor([ids])).logits[0].float(), -1)


def test_body_and_projection_make_the_model(engine: Engine) -> None:
    ids = list(range(5, 60))
    halves = Halves(engine.model)
    body = engine.model.model
    found = halves.log_probabilities(halves.hidden(torch.tensor([ids]))[0])
    torch.testing.assert_close(found, whole_scores(engine, ids), rtol=1e-5, atol=1e-5)
    assert engine.model.model is body


def test_the_projection_is_the_familys_own() -> None:
    """granitemoe divides its scores; a bare output projection would not."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    torch.manual_seed(0)
    model = GraniteMoeForCausalLM(
        GraniteMoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, logits_scaling=7.0, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(3, 20)[None]
    halves = Halves(model)
    found = halves.log_probabilities(halves.hidden(ids)[0])
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0].float(), -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_body_comes_back_after_a_failure(engine: Engine) -> None:
    body = engine.model.model
    with pytest.raises(RuntimeError):
        Halves(engine.model).log_probabilities(torch.zeros(3, 7))
    assert engine.model.model is body


def test_perplexity_is_its_definition(engine: Engine, tokenizer: Any) -> None:
    rows = tasks.sequences(tokenizer, TEXT, 100, None)
    assert [len(row) for row in rows] == [100, 100]
    steps: list[int] = []
    found = tasks.perplexity(Likelihood(engine.model, 256), rows, steps.append)
    losses = [
        F.nll_loss(whole_scores(engine, row)[:-1], torch.tensor(row[1:]), reduction="sum").item()
        for row in rows
    ]
    assert found.tokens == 198
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 198), rel=1e-5)
    assert steps == [100, 200]


def test_long_sequences_go_through_in_pieces(
    engine: Engine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tasks.sequences(tokenizer, TEXT, 150, None)[0]
    whole = Likelihood(engine.model, 256).hidden(row)
    monkeypatch.setattr(likelihoods, "SHORT_CHUNK_TOKENS", 32)
    lengths: list[int] = []
    engine.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(
        Likelihood(engine.model, 256).hidden(row), whole, rtol=1e-4, atol=1e-4
    )
    assert lengths == [32, 32, 32, 32, 22]
    # A family that takes no cache of ours is never given a piece.
    monkeypatch.setattr(likelihoods, "new_cache", lambda model: None)
    lengths.clear()
    assert torch.equal(Likelihood(engine.model, 256).hidden(row), whole)
    assert lengths == [150]


def test_a_continuation_is_written_after_its_prompt(
    tiny_store: Path, open_engine: Open, tokenizer: Any
) -> None:
    ids = tasks.sequences(tokenizer, TEXT, 80, 80)[0]
    exact = open_engine(tiny_store, experts="50%", compute="eager", scored_tokens=64)
    whole = tasks.perplexity(Likelihood(exact.model, 512), [ids], lambda done: None)
    kept: list[torch.Tensor] = []
    part = tasks.perplexity(
        Likelihood(exact.model, 512), [ids], lambda done: None, kept.append, written=20
    )
    assert (whole.tokens, part.tokens) == (79, 20)
    assert kept[0].shape[0] == 21
    scores = whole_scores(exact, list(ids))
    want = scores[59:79].gather(1, torch.tensor(ids[60:])[:, None]).mean()
    assert part.perplexity == pytest.approx(math.exp(-want), rel=1e-4)
    # Only the prompt is in two bits: decoding is not, and the first prediction already differs.
    hybrid = open_engine(
        tiny_store, experts="50%", compute="eager", scored_tokens=64, int2="tail", int2_share=1.0
    )
    other: list[torch.Tensor] = []
    tasks.perplexity(
        Likelihood(hybrid.model, 512), [ids], lambda done: None, other.append, written=20
    )
    assert not torch.equal(other[0][0], kept[0][0])
    for written in (0, 80):
        with pytest.raises(ConfigError, match="need at least one before them"):
            Likelihood(exact.model, 512).continued(ids, written)
    with pytest.raises(ConfigError, match="the context takes 64"):
        Likelihood(exact.model, 64).continued(ids, 20)


def test_a_sequence_beyond_the_context_is_refused(tiny_store: Path, open_engine: Open) -> None:
    small = Likelihood(open_engine(tiny_store, experts="50%").model, 64)
    with pytest.raises(ConfigError, match="a sequence of 65 tokens, the context takes 64"):
        small.hidden(list(range(65)))


def test_sequences_are_spread_evenly(tokenizer: Any) -> None:
    rows = tasks.sequences(tokenizer, TEXT, 20, None)
    assert [token for row in rows for token in row] == tokenizer(TEXT).input_ids[: len(rows) * 20]
    few = tasks.sequences(tokenizer, TEXT, 20, 100)
    assert len(few) == 5
    assert few == [rows[i * len(rows) // 5] for i in range(5)]
    assert tasks.sequences(tokenizer, "short text", 50, None) == [tokenizer("short text").input_ids]
    assert sum(map(len, tasks.sequences(tokenizer, TEXT, 64, 30))) == 30  # never more than asked
    with pytest.raises(ConfigError, match="1 tokens, need at least 2"):
        tasks.sequences(tokenizer, "a", 50, None)


@pytest.mark.parametrize("size", [7, 33, 64])
def test_a_text_in_pieces_has_the_same_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    text = f"{TEXT}  Two spaces.\n\nA new paragraph, and {'onelongword' * 12} at its end.  "
    calls: list[str] = []

    class Spy:
        def __call__(self, piece: str, **options: Any) -> Any:
            calls.append(piece)
            return tokenizer(piece, **options)

    monkeypatch.setattr(tasks, "_PIECE_CHARS", size)
    rows = tasks.sequences(Spy(), text, 10, None)
    assert "".join(calls) == text
    assert len(calls) > 4
    assert [token for row in rows for token in row] == tokenizer(text).input_ids[: 10 * len(rows)]


def test_pieces_end_where_a_word_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(piece: str, **options: Any) -> Any:
        calls.append(piece)
        return tokenizer(piece, **options)

    monkeypatch.setattr(tasks, "_PIECE_CHARS", 50)
    tasks.sequences(spy, TEXT, 10, None)
    assert all(piece.startswith(" ") and not piece.startswith("  ") for piece in calls[1:])


QUESTIONS = (
    tuple(
        Choice(query, ("a cat", "the long way home", "x"), gold)
        for gold, query in enumerate(("Who is there?", "Which road did they take at last?", "Why?"))
    )
    * 4
)
PASSAGES = tuple(LastWord(TEXT[:length], TEXT[length : length + 2]) for length in (20, 33, 57, 90))


def chosen(engine: Engine, tokenizer: Any, question: Choice) -> int:
    scores = []
    for choice in question.choices:
        before = tokenizer(question.query).input_ids
        row = tokenizer(f"{question.query} {choice}").input_ids
        found = whole_scores(engine, row)
        own = range(len(before), len(row))
        scores.append(sum(found[i - 1, row[i]].item() for i in own) / len(choice))
    return scores.index(max(scores))


def test_multiple_choice_is_likelihood_per_character(engine: Engine, tokenizer: Any) -> None:
    picks = [chosen(engine, tokenizer, question) for question in QUESTIONS]
    right = sum(p == q.gold for p, q in zip(picks, QUESTIONS, strict=True)) / len(QUESTIONS)
    as_picked = tuple(
        Choice(q.query, q.choices, pick) for q, pick in zip(QUESTIONS, picks, strict=True)
    )
    steps: list[int] = []
    likelihood = Likelihood(engine.model, 256)
    assert tasks.accuracy(likelihood, tokenizer, as_picked, steps.append) == 1.0
    assert tasks.accuracy(likelihood, tokenizer, QUESTIONS, steps.append) == pytest.approx(right)
    assert right < 1
    assert steps == [*range(1, 13)] * 2


def test_several_questions_share_a_step(engine: Engine, tokenizer: Any) -> None:
    rows: list[int] = []
    engine.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    tasks.accuracy(Likelihood(engine.model, 256), tokenizer, QUESTIONS, lambda done: None)
    assert sum(rows) == 36
    assert max(rows) > 3


def test_together_and_alone_are_the_same(
    tiny_store: Path, open_engine: Open, tokenizer: Any
) -> None:
    # Eight-bit activations turn the last bits of a batch's attention into whole codes.
    engine = open_engine(tiny_store, experts="50%", scored_tokens=64, compute="eager")
    rows = [tokenizer(TEXT[:length]).input_ids for length in (5, 60, 31, 44)]
    likelihood = Likelihood(engine.model, 256)
    for row, found in zip(rows, likelihood.hidden_of_many(rows), strict=True):
        torch.testing.assert_close(found, likelihood.hidden(row), rtol=1e-4, atol=1e-4)
    assert likelihood.step_tokens == 256  # no more than the context


def test_the_tail_of_a_row_does_not_depend_on_its_neighbours(
    tiny_store: Path, open_engine: Open, tokenizer: Any
) -> None:
    engine = open_engine(tiny_store, experts="50%", int2="tail", int2_share=0.4)
    sizes: list[int] = []
    engine.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    evaluate(engine, tokenizer, Tasks(questions={"one": QUESTIONS}), progress=no_progress)
    assert sizes == [1] * 36


def test_questions_that_cannot_be_scored_are_named(engine: Engine, tokenizer: Any) -> None:
    class Merging:
        """Makes one token of anything short, as a real vocabulary may."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] if len(text) < 9 else tokenizer(text).input_ids}

    likelihood = Likelihood(engine.model, 64)
    short = (LastWord(TEXT[:20], TEXT[20:24]), LastWord("He", "llo"))
    with pytest.raises(ConfigError, match="questions: number 2: 'Hello' is a single token"):
        tasks.accuracy(likelihood, Merging(), short, lambda done: None)
    with pytest.raises(ConfigError, match="questions: number 1: a sequence of 91 tokens"):
        tasks.accuracy(likelihood, tokenizer, (LastWord(TEXT[:90], "x"),), lambda done: None)


def test_last_words_are_right_when_every_token_is_the_likeliest(
    engine: Engine, tokenizer: Any
) -> None:
    likeliest = []
    for passage in PASSAGES:
        ids = tokenizer(passage.context).input_ids
        for _ in range(2):
            ids = [*ids, int(whole_scores(engine, ids)[-1].argmax())]
        likeliest.append(tokenizer.decode(ids[-2:]))
    answers = tuple(LastWord(p.context, end) for p, end in zip(PASSAGES, likeliest, strict=True))
    likelihood = Likelihood(engine.model, 256)
    found = tasks.accuracy(likelihood, tokenizer, answers, lambda done: None)
    expected = [
        tokenizer(p.context + end).input_ids[-2:] == tokenizer(end).input_ids
        for p, end in zip(PASSAGES, likeliest, strict=True)
    ]
    assert found == pytest.approx(sum(expected) / 4)
    assert tasks.accuracy(likelihood, tokenizer, PASSAGES, lambda done: None) < 1


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        ('Here it is:\n```json\n{"a": [1, 2]}\n```', True),
        ("[1, 2] and more", True),
        ('{"a": 1', False),
        ("{'a': 1}", False),
        ("no JSON here", False),
        ("3", False),
        ("[" * 100_000, False),
        ('{"a": NaN}', False),
    ],
)
def test_json_is_found_in_an_answer(text: str, valid: bool) -> None:
    assert tasks.holds_json(text) is valid


def run(engine: Engine, tokenizer: Any, **choices: Any) -> Evaluation:
    return evaluate(engine, tokenizer, Tasks(text=TEXT, sequence_tokens=64),
                    progress=no_progress, **choices)  # fmt: skip


def test_distance_to_a_reference(
    tiny_store: Path, open_engine: Open, tokenizer: Any, tmp_path: Path
) -> None:
    reference = Reference(tmp_path)
    four = open_engine(tiny_store, experts="50%", scored_tokens=64)
    first = run(four, tokenizer, keep=reference)
    assert first.kl is None
    same = run(open_engine(tiny_store, experts="25%", scored_tokens=64), tokenizer,
               against=reference)  # fmt: skip
    assert same.kl == 0.0
    assert same.top1_agreement == 1.0
    assert same.perplexity == first.perplexity

    two = open_engine(tiny_store, experts="50%", scored_tokens=64, int2="always")
    other = run(two, tokenizer, against=reference)
    rows = tasks.sequences(tokenizer, TEXT, 64, None)
    kls, agreed = [], []
    for row in rows:
        want, have = whole_scores(four, row), whole_scores(two, row)
        kls.append((want.exp() * (want - have)).sum(1))
        agreed.append(want.argmax(1) == have.argmax(1))
    assert other.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    assert other.top1_agreement == pytest.approx(torch.cat(agreed).float().mean().item())
    assert other.kl is not None
    assert other.kl > 0.01


def test_another_projection_is_no_reference(
    engine: Engine, tokenizer: Any, tiny_store: Path, open_engine: Open, tmp_path: Path
) -> None:
    reference = Reference(tmp_path)
    run(engine, tokenizer, keep=reference)
    other = open_engine(tiny_store, experts="50%")
    with torch.no_grad():
        other.model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(ConfigError, match="another output projection"):
        run(other, tokenizer, against=reference)


def test_json_prompts_are_asked(
    engine: Engine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"one": '{"a": 1}', "two": "[1, 2", "three": "Sure: [1, 2]", "four": "no"}
    asked: list[str] = []
    ask = Conversation.ask

    def spy(self: Conversation, prompt: Any, sampling: Any, *rest: Any) -> Any:
        asked.append(prompt[0]["content"])
        return replace(ask(self, prompt, sampling, *rest), text=answers[asked[-1]])

    monkeypatch.setattr(Conversation, "ask", spy)
    steps: list[tuple[str, int, int]] = []
    found = evaluate(engine, tokenizer, Tasks(json_prompts=tuple(answers)),
                     progress=lambda *step: steps.append(step))  # fmt: skip
    assert asked == list(answers)
    assert found.valid_json == 0.5
    assert steps == [("asking for JSON", i, 4) for i in (1, 2, 3, 4)]
    assert found.report.requests > 0


def test_a_reference_that_cannot_be_kept_is_one_line(
    engine: Engine, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="absent: cannot keep the reference") as caught:
        run(engine, tokenizer, keep=Reference(tmp_path / "absent"))
    assert "\n" not in str(caught.value)


def test_scores_are_part_of_the_plan(tiny_store: Path, open_engine: Open) -> None:
    def workspace(**choices: int) -> int:
        engine = open_engine(tiny_store, experts="50%", **choices)
        return engine.blueprint.memory.demands.workspace_bytes

    assert workspace(scored_tokens=101) - workspace() == 100 * 320 * 4 * 6
