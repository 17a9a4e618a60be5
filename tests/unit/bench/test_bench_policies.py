"""Policies side by side: the same tokens, honest counts, a bound that nobody passes."""

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from fate_moe import native
from fate_moe.bench import answers, policies
from fate_moe.bench.policies import (
    ABLATION,
    BOUND,
    Form,
    Row,
    parse_policy,
    requests_of,
    run_policies,
)
from fate_moe.bench.policies_present import link_text, markdown, plot, ratios
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.cli import app
from fate_moe.cli import policies as _policies
from fate_moe.config import Config, make_config
from fate_moe.engine.handle import Engine
from fate_moe.engine.plan import Blueprint, draw
from fate_moe.errors import ConfigError
from fate_moe.models.load import load_tokenizer
from fate_moe.store.background import Landed
from fate_moe.store.format import read_manifest
from fate_moe.store.reader import TOGETHER_BYTES, FileReader, Request
from fate_moe.types import ExpertKey, no_progress
from tests.unit.cli.test_commands import refused

FORM = Form(
    policies=("demand", "path", "fate", "tuned"), budgets=(0.5,), links=(None, 2e6), rounds=1,
    prompt_tokens=12, new_tokens=30, warm_ups=1, settings=(("window", 9),),
)  # fmt: skip


@pytest.fixture
def reader(tiny_store: Path) -> FileReader:
    return FileReader(tiny_store, read_manifest(tiny_store))


def test_a_throttled_reader_reads_the_same_and_takes_its_time(reader: FileReader) -> None:
    size = reader.record_bytes(0)
    slow = ThrottledReader(reader, size / 0.02)  # a record every 20 ms
    plain, throttled = bytearray(size), [bytearray(size) for _ in range(4)]
    key = ExpertKey(1, 3)
    reader.read_into(key, memoryview(plain))
    began_s = time.perf_counter()
    threads = [
        threading.Thread(target=slow.read_into, args=(key, memoryview(buffer)))
        for buffer in throttled[:2]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.read_many([Request(key, memoryview(b)) for b in throttled[2:]]) == [None, None]
    assert time.perf_counter() - began_s >= 4 * 0.02  # side by side, too, they share the link
    assert throttled == [plain] * 4
    assert (slow.mode, slow.batch_bytes) == (reader.mode, reader.batch_bytes)
    slow.close()


def test_a_part_of_a_record_takes_a_part_of_the_time(reader: FileReader) -> None:
    slow, buffer = ThrottledReader(reader, 100.0), memoryview(bytearray(4096))
    size = reader.record_bytes(0)
    head = slow._take(Request(ExpertKey(0, 0), buffer, 0, 1024))
    tail = slow._take(Request(ExpertKey(0, 0), buffer, 1024))
    assert tail - head == pytest.approx((size - 1024) / 100)
    slow.close()


@pytest.mark.skipif(not native.is_available(), reason="nothing is read in the background")
def test_reads_in_the_background_share_the_link_and_can_be_withdrawn_until_their_turn(
    reader: FileReader,
) -> None:
    keys = [ExpertKey(layer, e) for layer in range(4) for e in range(16)]
    size, step_s = reader.record_bytes(0), 0.002
    slow = ThrottledReader(reader, size / step_s)
    assert (len(keys) - 1) * size > TOGETHER_BYTES
    buffers = {key: memoryview(bytearray(size)) for key in keys}
    began_s = time.perf_counter()
    slow.start([Request(key, buffers[key]) for key in keys])
    assert not slow.withdraw(keys[0])
    assert not slow.landed()
    assert slow.withdraw(keys[-1])
    found: list[Landed] = []
    while slow.wait(10):
        found += slow.landed()
    assert time.perf_counter() - began_s >= (len(keys) - 1) * step_s
    assert sorted(one.key for one in found) == keys[:-1]
    assert all(one.failure is None and one.ago_s >= 0 for one in found)
    plain = bytearray(size)
    for key in keys[:-1]:
        reader.read_into(key, memoryview(plain))
        assert buffers[key] == plain
    slow.start([Request(key, buffers[key]) for key in keys])
    slow.forget()
    assert not slow.wait(0.5)
    slow.close()


@pytest.fixture(scope="module")
def rows(tiny_store: Path) -> list[Row]:
    out = io.StringIO()
    told: list[Row] = []
    requests = requests_of(tiny_store, ["abc", "hello there", "x"], FORM)
    found = run_policies(tiny_store, requests, FORM, out, told.append, no_progress)
    assert told == found
    assert [json.loads(line)["policy"] for line in out.getvalue().splitlines()] == [
        row.policy for row in found
    ]
    return found


def test_every_policy_in_every_cell(rows: list[Row]) -> None:
    cells = [(row.policy, row.link_bytes_s) for row in rows]
    assert cells == [(BOUND, 2e6)] + [
        (policy, link) for link in FORM.links for policy in FORM.policies
    ]


def test_the_counts_are_those_of_decoding(rows: list[Row]) -> None:
    found = {(row.policy, row.link_bytes_s): row for row in rows}
    for link in FORM.links:
        demand = found["demand", link]
        assert demand.recall is None
        assert demand.late_rate == 0
        assert demand.hit_rate is not None
        assert 0 < demand.hit_rate < 1
        assert demand.guessing == "nothing is guessed"
        for policy in ("path", "fate", "tuned"):
            assert found[policy, link].recall is not None
            assert found[policy, link].guessing != "nothing is guessed"
    # What demand moves does not depend on the link.
    assert found["demand", None].bytes_token == found["demand", 2e6].bytes_token
    for row in rows:
        if row.policy == BOUND:
            assert row.bytes_prompt is None
        else:
            assert row.bytes_prompt is not None
            assert row.bytes_prompt > 0
            assert row.bytes_token > 0


def test_nobody_passes_the_bound(rows: list[Row]) -> None:
    bound = next(row for row in rows if row.policy == BOUND)
    slow = [row for row in rows if row.link_bytes_s == 2e6 and row.policy != BOUND]
    assert all(row.decode_tok_s <= bound.decode_tok_s for row in slow)
    assert all(row.bytes_token >= bound.bytes_token for row in slow)
    assert bound.bytes_token > 0


def test_a_table_and_a_plot(rows: list[Row], tmp_path: Path) -> None:
    lines = markdown(rows).splitlines()
    assert len(lines) == 2 + 4 + 5
    demand = next(line for line in lines if "| demand |" in line)
    assert "| 1.00x |" in demand
    assert lines[-5].startswith("| 0.002 GB/s | 50 % | bound |")
    assert lines[-5].endswith("| 100 % |")
    plot(rows, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(rows, tmp_path / "none" / "p.png", "title")
    assert link_text(None) == "as it is"


class Watch:
    """Who is open, and who answers which prompt, while policies are measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: list[tuple[str, int, int]] = []  # policy, first token, policies open
        self._open: list[Engine] = []
        opened, answered, closed = policies._open, answers._parts, Engine.close

        def parts(engine: Engine, ids: Tensor, new_tokens: int) -> Iterator[answers.Spent]:
            for part in answered(engine, ids, new_tokens):
                if (name := engine.blueprint.config.policy) != "resident":
                    self.turns.append((name, int(ids[0, 0]), len(self._open)))
                yield part

        def open_one(*arguments: object) -> Engine:
            engine = opened(*arguments)  # type: ignore[arg-type]
            self._open.append(engine)
            return engine

        def close(engine: Engine) -> None:
            self._open.remove(engine)
            closed(engine)

        monkeypatch.setattr(answers, "_parts", parts)
        monkeypatch.setattr(policies, "_open", open_one)
        monkeypatch.setattr(Engine, "close", close)

    @property
    def is_over(self) -> bool:
        return not self._open


SHORT = replace(FORM, policies=("demand", "fate", "tuned"), links=(None,), rounds=2, new_tokens=10)
PARTS = 3  # the prompt, eight tokens, and two


def test_each_prompt_is_answered_by_all_in_turns(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, notes = Watch(monkeypatch), list[str]()
    requests = requests_of(tiny_store, ["abc", "hello there", "x"], SHORT)
    rows = run_policies(
        tiny_store, requests, SHORT, io.StringIO(), lambda row: None, no_progress, notes.append
    )
    first = [int(one[0, 0]) for one in requests]
    orders = [("demand", "fate", "tuned"), ("fate", "tuned", "demand"), ("tuned", "demand", "fate")]
    assert watch.turns == [
        (name, first[place], 3)
        for number in range(2)
        for place in range(3)
        for _ in range(PARTS)
        for name in orders[(number + place) % 3]
    ]
    assert watch.is_over
    assert notes == []
    assert all(row.in_turns and len(row.decode_each) == 2 for row in rows)
    for row in rows:
        assert 2 / sum(1 / rate for rate in row.decode_each) == pytest.approx(row.decode_tok_s)


def test_without_room_for_all_each_policy_is_alone_and_that_is_said(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = replace(SHORT, rounds=1, settings=(("ram", "100GiB"),))
    plans = [draw(tiny_store, policies._config(form, name, 0.5)).memory for name in form.policies]
    # Room for one as planned now, and for what the process grows by as others come and go.
    room = max(plan.planned_bytes for plan in plans) + 2 * 2**20
    slots = sum(plan.planned_bytes - plan.demands.base_bytes for plan in plans[1:])
    assert slots > 4 * 2**20
    real = policies.draw
    monkeypatch.setattr(policies, "draw", lambda store, config: _within(real(store, config), room))
    watch, notes = Watch(monkeypatch), list[str]()
    requests = requests_of(tiny_store, ["abc", "hello there", "x"], form)
    rows = run_policies(
        tiny_store, requests, form, io.StringIO(), lambda row: None, no_progress, notes.append
    )
    first = [int(one[0, 0]) for one in requests]
    assert watch.turns == [
        (name, token, 1) for name in form.policies for token in first for _ in range(PARTS)
    ]
    assert watch.is_over
    assert len(notes) == 1
    assert notes[0].startswith("ram: 3 policies with 50 % of the experts need ")
    assert not any(row.in_turns for row in rows)


def _within(blueprint: Blueprint, room: int) -> Blueprint:
    return replace(blueprint, memory=replace(blueprint.memory, budget_bytes=room))


def test_a_ratio_is_of_the_same_prompt_in_the_same_round() -> None:
    def row(policy: str, number: int, *each: float) -> Row:
        return Row(number, policy, 0.5, None, 100.0, sum(each) / len(each), 0.5, 0.0, None, 1e6,
                   0.1, decode_each=each)  # fmt: skip

    demand = [row("demand", 1, 10.0, 40.0), row("demand", 2, 20.0, 20.0)]
    tuned = [row("tuned", 2, 20.0, 24.0), row("tuned", 1, 15.0, 44.0)]
    assert ratios(tuned, demand) == pytest.approx([1.0, 1.2, 1.5, 1.1])
    assert ratios(tuned, demand[:1]) == pytest.approx([1.5, 1.1])
    assert ratios(tuned, []) == []
    lines = markdown([*demand, *tuned]).splitlines()
    assert lines[0].endswith("| against demand | quartiles | of the bound |")
    assert lines[2].endswith("| 1.00x | 1.00 to 1.00 | - |")
    assert lines[3].endswith("| 1.15x | 1.08 to 1.27 | - |")
    assert "| tuned | 22.00 | 100.0 |" in lines[3]
    alone = markdown(tuned[:1]).splitlines()[2]
    assert alone.endswith("| - | - | - |")


def test_prompts_are_cut_or_go_on_with_others_that_no_request_has_yet(tiny_store: Path) -> None:
    tokenizer = load_tokenizer(tiny_store)
    texts = ["abcde fgh", "hello there", "x y z", "one two"]

    def ids(*parts: str) -> list[int]:
        return [
            token
            for place, text in enumerate(parts)
            for token in tokenizer(
                "\n\n" * (place > 0) + text, add_special_tokens=place == 0
            )["input_ids"]
        ]  # fmt: skip

    form = replace(FORM, prompt_tokens=len(ids(texts[1], texts[3])))
    found = requests_of(tiny_store, texts, form, 2)
    assert [one.shape[1] for one in found] == [form.prompt_tokens] * 2
    wanted = ids(texts[0], texts[2], texts[0], texts[2])
    assert found[0][0].tolist() == wanted[: form.prompt_tokens]
    assert found[1][0].tolist() == ids(texts[1], texts[3])
    cut = requests_of(tiny_store, texts, replace(form, prompt_tokens=2))
    assert [one[0].tolist() for one in cut] == [ids(text)[:2] for text in texts]
    assert len(requests_of(tiny_store, texts, form, 9)) == 4
    with pytest.raises(ConfigError, match="one of them is empty"):
        requests_of(tiny_store, ["abc", ""], form)


def test_too_few_prompts_are_one_line(tiny_store: Path) -> None:
    requests = requests_of(tiny_store, ["abc"], FORM)
    with pytest.raises(ConfigError, match="prompts: 1, of which 1 warm up; need one more"):
        run_policies(tiny_store, requests, FORM, io.StringIO(), lambda row: None, no_progress)


def test_a_policy_with_settings_changed() -> None:
    assert parse_policy("tuned") == ("tuned", {})
    assert parse_policy("fate+cache=lru+window=9") == ("fate", {"cache": "lru", "window": 9})
    hybrid = {"int2": "tail", "int2_share": 0.25}
    assert parse_policy("demand+int2_share=25%") == ("demand", hybrid)
    for wrong in ("5MiB", "300%", "some"):
        with pytest.raises(ConfigError, match="int2_share"):
            parse_policy(f"tuned+int2_share={wrong}")
    lossy = {"int2_on_miss": 0.15, "routing_bias": 0.5}
    assert parse_policy("demand+int2_on_miss=15%+routing_bias=0.5") == ("demand", lossy)
    for wrong in ("int2_on_miss=5MiB", "routing_bias=some", "routing_bias=-1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            parse_policy(f"tuned+{wrong}")
    for name in ABLATION:
        assert parse_policy(name)[0] in ("demand", "tuned", "fate")


def test_each_arm_of_the_ablation_leaves_something_out() -> None:
    def parts(name: str) -> Config:
        policy, changes = parse_policy(name)
        return replace(make_config(policy, **changes), policy="")

    arms = [parts(name) for name in ABLATION]
    assert all(one not in arms[:place] for place, one in enumerate(arms))


def fate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "policies", *map(str, arguments)])


def test_the_command(tiny_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fate(
        tiny_store, "--policies", "demand,tuned+cache=lru", "--experts", "50%",
        "--link", "none,50MB/s",
        "--prompt", "8", "--tokens", "4", "--rounds", "1", "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(row["policy"], row["link_bytes_s"]) for row in data["rows"]] == [
        (BOUND, 50e6), ("demand", None), ("tuned+cache=lru", None), ("demand", 50e6),
        ("tuned+cache=lru", 50e6),
    ]  # fmt: skip
    assert "round 1, link 0.05 GB/s, 50 % of the experts: tuned+cache=lru " in result.stderr
    assert (out / "table.md").read_text().startswith("# store: 8 tokens read, 4 written")
    assert (out / "plot.png").stat().st_size > 1000


def test_prompts_of_several_files_take_turns(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    (tmp_path / "a").write_text("abc\nxyz\nnever\n", encoding="utf-8")
    (tmp_path / "b").write_text('{"question": "hello"}\n', encoding="utf-8")
    result = fate(
        tiny_store, "--policies", "demand", "--experts", "50%", "--prompts", tmp_path / "a",
        "--prompts", tmp_path / "b", "--prompts", "chat", "--limit", "2", "--prompt", "2",
        "--tokens", "1", "--rounds", "1", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    wanted = ["abc", "hello", _policies._OWN_PROMPTS[0], "xyz", _policies._OWN_PROMPTS[1]]
    tokenizer = load_tokenizer(tiny_store)
    assert [token for _, token, _ in watch.turns[::2]] == [
        tokenizer(t)["input_ids"][0] for t in wanted
    ]


def test_everything_resident_may_take_its_turns(tiny_store: Path, tmp_path: Path) -> None:
    result = fate(
        tiny_store, "--policies", "resident,demand", "--experts", "50%", "--prompt", "4",
        "--tokens", "4", "--rounds", "1", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row["policy"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["resident"]["hit_rate"] == 1.0 > rows["demand"]["hit_rate"]
    assert rows["resident"]["bytes_token"] == 0 < rows["demand"]["bytes_token"]
    assert rows["resident"]["in_turns"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--policies", "best"], "policies: 'best' is none of demand, fate, path, resident, tuned"),
        (["--policies", "resident+window=3"], "policies: resident moves nothing"),
        (["--policies", "tuned+cache=lfuu"], "cache: 'lfuu' is none of arc"),
        (["--policies", "tuned+size=3"], "'size=3' changes none of predictor, cache"),
        (["--policies", "tuned+window=x"], "'window=x' changes none of"),
        (["--experts", "100%"], "experts: '100%': need a share below 100%"),
        (["--experts", "2GiB"], "experts: '2GiB': need a share"),
        (["--link", "fast"], "link: cannot read 'fast'"),
        (["--link", "10%"], "link: '10%': need none, or bytes per second"),
        (["--prompts", "absent.txt"], "prompts: absent.txt: cannot be read"),
        (["--link", "none,none"], "link: 'none,none': need different ones"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], why: str) -> None:
    refused(fate("tiny", "--out", tmp_path / "out", *arguments), why)
    assert not list(tmp_path.iterdir())
