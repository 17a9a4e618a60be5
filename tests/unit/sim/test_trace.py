"""Traces come back as they were written, and what is no trace is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fate_moe.errors import FormatError, StoreError
from fate_moe.sim.trace import Step, Trace, read_trace, summarize
from fate_moe.sim.trace_file import write_packed
from fate_moe.types import Choice, Phase, Prediction

ABOUT = {"model": "small", "num_layers": 2, "num_experts": 4, "top_k": 2}


def lines(path: Path, *rows: object, about: object = ABOUT) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in (about, *rows)), encoding="utf-8")
    return path


def example() -> Trace:
    prompt = Step(
        [Choice(0, [2, 0, 1], 3, [3, 2, 1]), Choice(1, [1, 0], 3, [4, 2])],
        [None, Prediction(1, (1, 0, 3), 2)],
    )
    token = Step([Choice(0, [0, 3]), Choice(1, [])], [None, Prediction(1, (2,), 1)])
    return Trace("small", (4, 4), 2, [prompt, token], (4096, 8192), "cross_layer")


def test_json_lines(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        {"layers": [[0, 3], [1, 2]], "tokens": 5, "phase": "prefill"},
        {"layers": [[1], []]},
    )
    trace = read_trace(path)
    assert (trace.model, trace.experts, trace.top_k, trace.requests) == ("small", (4, 4), 2, 5)
    assert trace.steps[0].choices == [Choice(0, [0, 3], 5), Choice(1, [1, 2], 5)]
    assert [step.phase for step in trace.steps] == [Phase.PREFILL, Phase.DECODE]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"layers": [[0], [4]]}, "line 2: .* no list of expert ids below 4"),
        ({"layers": [[0], [1, 1]]}, "names an expert twice"),
        ({"layers": [[0]]}, "need 'layers', a list of 2 lists"),
        ({"layers": [[0], [True]]}, "no list of expert ids"),
        ({"layers": [[0], [1]], "tokens": 0}, "'tokens' is 0"),
        ([], "need 'layers'"),
    ],
)
def test_a_bad_line_is_one_line(tmp_path: Path, row: object, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        read_trace(lines(tmp_path / "t.jsonl", row))


@pytest.mark.parametrize("text", ["{", "{}", '{"model": "x"}', "[" * 100_000])
def test_what_is_no_trace_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=str(path)):
        read_trace(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="absent: cannot be read: No such file"):
        read_trace(tmp_path / "absent")


def test_packed_there_and_back(tmp_path: Path) -> None:
    scores = np.linspace(-1, 1, 16, dtype=np.float16).reshape(2, 2, 4)
    alike = np.array([[np.nan, 0.5], [np.nan, 0.75]], np.float16)
    trace = replace(example(), scores=scores, similarity=alike)
    write_packed(trace, tmp_path / "t.trace")
    back = read_trace(tmp_path / "t.trace")
    assert back.scores is not None
    assert back.similarity is not None
    np.testing.assert_array_equal(back.scores, scores)
    np.testing.assert_array_equal(back.similarity, alike)
    assert replace(back, scores=None, similarity=None) == example()
    assert [path.name for path in tmp_path.iterdir()] == ["t.trace"]


@given(
    steps=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.lists(st.lists(st.integers(0, 6), max_size=5, unique=True), min_size=3, max_size=3),
        ),
        max_size=8,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_requests_there_and_back(
    tmp_path: Path, steps: list[tuple[int, list[list[int]]]]
) -> None:
    trace = Trace(
        "any", (7, 7, 7), 2,
        [
            Step([
                Choice(layer, ids, tokens, None if tokens == 1 else [layer + 1] * len(ids))
                for layer, ids in enumerate(layers)
            ])
            for tokens, layers in steps
        ],
    )  # fmt: skip
    write_packed(trace, tmp_path / "t.trace")
    assert read_trace(tmp_path / "t.trace") == trace


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requests", np.array([2, 0, 1, 1, 0, 0, 9], np.uint16)),  # no such expert
        ("requests", np.array([2, 2, 1, 1, 0, 0, 3], np.uint16)),  # twice in one step
        ("requests", np.array([2, 0, 1], np.uint16)),
        ("request_ends", np.array([3, 5, 4, 7], np.int64)),
        ("request_ends", np.array([3, 5, 7], np.int64)),
        ("counts", np.zeros(7, np.int32)),
        ("tokens", np.array([3, 0], np.int32)),
        ("cores", np.zeros(3, np.uint16)),
        ("scores", np.zeros((2, 2, 5), np.float16)),
        ("similarity", np.zeros(4, np.float16)),
        ("tokens", np.zeros((), np.int32)),
        ("tokens", np.array([3.0, 1.0])),
        ("text", np.zeros(1, np.uint8)),
        ("about", np.frombuffer(b"{}", np.uint8)),
        ("about", np.frombuffer(b'{"fate_trace": 2}', np.uint8)),
    ],
)
def test_a_damaged_part_is_one_line(tmp_path: Path, name: str, value: np.ndarray) -> None:
    path = tmp_path / "t.trace"
    write_packed(example(), path)
    save_file({**load_file(path), name: value}, path)
    with pytest.raises(FormatError, match=str(path)):
        read_trace(path)


def test_a_missing_part_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    write_packed(example(), path)
    parts = load_file(path)
    del parts["counts"]
    save_file(parts, path)
    with pytest.raises(FormatError, match="no trace of fate: counts missing"):
        read_trace(path)


@given(data=st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_trace_or_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        read_trace(path)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        write_packed(example(), tmp_path / "none" / "t.trace")
    assert not list(tmp_path.iterdir())


def test_a_summary() -> None:
    facts = summarize(example())
    assert (facts.steps, facts.decode_steps, facts.layers, facts.requests) == (2, 1, 2, 7)
    assert facts.recall == 1.0  # of layer 1 in the first step: both; it asked for nothing after
    assert facts.recall_top_k == 1.0
