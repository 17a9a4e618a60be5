"""Policies side by side: the same tokens, honest counts, a bound that nobody passes."""

import io
import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fate_moe import native
from fate_moe.bench.policies import (
    ABLATION,
    BOUND,
    Form,
    Row,
    parse_policy,
    requests_of,
    run_policies,
)
from fate_moe.bench.policies_present import link_text, markdown, plot
from fate_moe.bench.throttle import ThrottledReader
from fate_moe.cli import app
from fate_moe.cli import policies as _policies  # noqa: F401 - registers the command
from fate_moe.errors import ConfigError
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
    for name in ABLATION:
        assert parse_policy(name)[0] in ("demand", "tuned", "fate")


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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--policies", "best"], "policies: 'best' is none of demand, fate, path, tuned"),
        (["--policies", "resident"], "policies: 'resident' is none of demand"),
        (["--policies", "tuned+cache=lfuu"], "cache: 'lfuu' is none of arc"),
        (["--policies", "tuned+size=3"], "'size=3' changes none of predictor, cache"),
        (["--policies", "tuned+window=x"], "'window=x' changes none of"),
        (["--experts", "100%"], "experts: '100%': need a share below 100%"),
        (["--experts", "2GiB"], "experts: '2GiB': need a share"),
        (["--link", "fast"], "link: cannot read 'fast'"),
        (["--link", "10%"], "link: '10%': need none, or bytes per second"),
        (["--link", "none,none"], "link: 'none,none': need different ones"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], why: str) -> None:
    refused(fate("tiny", "--out", tmp_path / "out", *arguments), why)
    assert not list(tmp_path.iterdir())
