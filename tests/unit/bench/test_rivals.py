"""Rivals: what is run, what is read of what they print, rounds, standings."""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe import native
from fate_moe.bench import rounds
from fate_moe.bench.ceilings import decode_ceiling, prefill_ceiling, token_bytes
from fate_moe.bench.cgroup import DiskRate
from fate_moe.bench.machine import Card
from fate_moe.bench.passes import time_pass
from fate_moe.bench.process import Done, ending_tidily, forget_files, run_alone
from fate_moe.bench.rivals.disk_offload import DiskOffload
from fate_moe.bench.rivals.fate import Fate
from fate_moe.bench.rivals.llama_bench import IkLlamaCpp, LlamaCpp, read_llama_bench
from fate_moe.bench.rivals.rival import Cell, Reading, Setting
from fate_moe.bench.rivals.table import RIVALS, open_rivals
from fate_moe.bench.rounds import FAILED, LATE, NO_MEMORY, OK, Bench, Form, Row, run_rounds
from fate_moe.bench.shapes import find_shape
from fate_moe.bench.standings import best, markdown, plot, standings
from fate_moe.bench.synthetic import write_store
from fate_moe.bench.worker import Job, measure
from fate_moe.config import make_config
from fate_moe.engine.build import build
from fate_moe.errors import ConfigError
from fate_moe.store.format import read_manifest
from fate_moe.store.header import read_header
from fate_moe.types import no_progress

GIB = 2**30
CARD = Card("Chip", 2, ("avx2",), 8 * GIB, "Linux", 0.5, {1: 1e10, 2: 2e10}, "sda", 128,
            {"4 MiB x 4": 1e9})  # fmt: skip
DECODE, LIMITED = Cell("decode", 8, 2, None, 2), Cell("decode", 8, 2, 4 * GIB, 2)
PREFILL = Cell("prefill", 64, 1, 4 * GIB, 2)

SAMPLE = """ggml: a line of a library that talks
[
  {
    "build_commit": "0c1e57098",
    "n_prompt": 0,
    "n_gen": 8,
    "n_depth": 0,
    "avg_ns": 1500000000,
    "avg_ts": 5.5,
    "samples_ns": [ 2000000000, 1000000000 ],
    "samples_ts": [ 4.0, 8.0 ]
  }
]
"""


def llama(kind: Any, help_text: str) -> Any:
    return kind(Path("/bin/bench"), help_text, Path("m.gguf"))


def test_the_last_pass_of_llama_bench_counts() -> None:
    found = read_llama_bench("llama.cpp", SAMPLE)
    assert found.tok_s == 8.0
    assert found.details == {"samples_s": [2.0, 1.0], "build": "0c1e57098"}


@pytest.mark.parametrize(
    "text",
    ["", "[\n]", "[\n{}\n]", SAMPLE.replace("1000000000", "0"), SAMPLE.replace("[ 2000", "[ x"),
     SAMPLE.replace('"n_gen": 8,', "")],
)  # fmt: skip
def test_other_output_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp: printed no result"):
        read_llama_bench("llama.cpp", text)


def test_llama_cpp_repacks_in_memory_and_maps_under_a_limit() -> None:
    rival = llama(LlamaCpp, "--no-warmup --load-mode --repack --n-gen")
    (free,) = rival.settings(DECODE, False)
    assert free.command[:3] == ("/bin/bench", "-m", "m.gguf")
    assert "--repack" not in free.command
    assert "-n 8" in " ".join(free.command)
    assert "-p 0" in " ".join(free.command)
    assert "-r 2" in " ".join(free.command)
    (capped,) = rival.settings(PREFILL, True)
    assert "--load-mode mmap --repack 0" in " ".join(capped.command)
    assert "-p 64 -n 0" in " ".join(capped.command)
    assert [one.name for one in rival.settings(DECODE, True)] == ["repack", "mmap"]


def test_options_follow_the_help_of_the_build() -> None:
    (old,) = llama(LlamaCpp, "--n-gen").settings(LIMITED, False)
    assert old.command[-2:] == ("-mmp", "1")
    assert "--no-warmup" not in old.command
    rival = llama(IkLlamaCpp, "--warmup --prefetch-experts --n-gen")
    assert [one.name for one in rival.settings(LIMITED, True)] == ["mmap", "prefetch-experts"]
    assert [one.name for one in rival.settings(LIMITED, False)] == ["mmap"]
    assert "-w 0 -rtr 1" in " ".join(rival.settings(DECODE, False)[0].command)


def test_a_binary_that_is_missing_or_another_is_one_line(tmp_path: Path) -> None:
    store, gguf = tmp_path, tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match=r"--llama-bench: .*no: no such file; give the path"):
        open_rivals(store, gguf, {"llama.cpp": tmp_path / "no"})
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ConfigError, match=r"--ik-llama-bench: .*text: cannot be run"):
        open_rivals(store, gguf, {"ik_llama.cpp": tmp_path / "text"})
    with pytest.raises(ConfigError, match="is no llama-bench"):
        open_rivals(store, gguf, {"llama.cpp": Path("/bin/echo")})


def test_only_given_programs_run(tmp_path: Path) -> None:
    script = tmp_path / "bench"
    script.write_text("#!/bin/sh\necho options: --n-gen\n")
    script.chmod(0o755)
    binaries = [name for name, entry in RIVALS.items() if entry.reads_gguf]
    found = open_rivals(tmp_path, tmp_path / "m.gguf", dict.fromkeys(binaries, script))
    assert [one.name for one in found] == ["fate", "llama.cpp", "ik_llama.cpp"]
    assert len(open_rivals(tmp_path, tmp_path, dict.fromkeys(RIVALS))) == 1


def test_transformers_needs_a_checkpoint_and_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--transformers-checkpoint: .*no config.json there"):
        open_rivals(tmp_path, tmp_path, {"transformers": tmp_path})
    (tmp_path / "config.json").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="disk offload needs accelerate; try pip install"):
        open_rivals(tmp_path, tmp_path, {"transformers": tmp_path})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert open_rivals(tmp_path, tmp_path, {"transformers": tmp_path})[1].name == "transformers"


def test_disk_offload_is_told_the_cell() -> None:
    rival = DiskOffload(Path("/c"))
    (setting,) = rival.settings(LIMITED, True)
    job = json.loads(setting.command[-1])
    assert (job["folder"], job["stage"], job["limit_bytes"]) == ("/c", "decode", 4 * GIB)
    assert rival.read('warning\n{"tok_s": 2.5}\n').tok_s == 2.5
    with pytest.raises(ConfigError, match="transformers: printed no result"):
        rival.read("Killed")


def test_fate_prints_no_result() -> None:
    with pytest.raises(ConfigError, match="fate: printed no result"):
        Fate(Path("x")).read("Traceback")


# --- processes


def test_a_program_is_run_to_its_end() -> None:
    done = run_alone([sys.executable, "-c", "import sys; print('out'); sys.exit(3)"], None, 20)
    assert (done.code, done.is_late, done.stdout) == (3, False, "out\n")
    assert done.peak_bytes is None


def test_a_slow_program_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    began = time.perf_counter()
    done = run_alone(["/bin/sh", "-c", f"sleep 60 & echo $! > {note}; wait"], None, 0.5)
    assert done.is_late
    assert time.perf_counter() - began < 20
    child = Path("/proc") / note.read_text().strip() / "stat"
    for _ in range(50):  # until whoever inherits it has taken note
        if not child.exists() or ") Z " in child.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_asked_to_end_everything_is_put_back(tmp_path: Path) -> None:
    """The program that runs is ended, too."""
    note = tmp_path / "child"
    line = f"echo $$ > {note}; sleep 0.5; kill -TERM {os.getpid()}; exec sleep 60"
    before = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        with ending_tidily():
            run_alone(["/bin/sh", "-c", line], None, 60)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_forgetting_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    forget_files([tmp_path / "a"])
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000


# --- ceilings


def test_ceilings() -> None:
    assert decode_ceiling(CARD, 1e9, 0) == 20  # 1 GB at 20 GB/s
    assert decode_ceiling(CARD, 1e9, 5e8) == 2  # half a GB at 1 GB/s takes longer
    assert decode_ceiling(CARD, 1e9, 1e6) == 20  # disk and memory side by side
    for both, seconds in (
        ((2e10, 1e9), 0.5),  # nothing is lost side by side
        ((0.0, 1e9), 0.55),  # one after the other
        ((1e10, 5e8), 0.55),  # no better than that
        ((1e10, 1e9), 0.5),  # half of memory is enough beside the whole disk
        ((1e10, 7.5e8), max(0.05 + 0.5 * 0.5 / 0.75, 0.5 + 0.05 * 0.25 / 0.5)),
    ):
        card = replace(CARD, both_bytes_s=both)
        assert decode_ceiling(card, 1e9, 5e8) == pytest.approx(1 / seconds)
        assert decode_ceiling(card, 1e9, 0) == 20
    assert prefill_ceiling(CARD, 512, 4e9) == 128
    assert prefill_ceiling(CARD, 512, 0) is None
    unknown = replace(CARD, disk_bytes_s={})
    assert decode_ceiling(unknown, 1e9, 1) is None
    assert decode_ceiling(unknown, 1e9, 0) == 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rivals") / "store"
    write_store(find_shape("tiny"), folder, resident_bits=4)
    return folder


def test_a_token_reads_all_but_the_embedding(store: Path) -> None:
    manifest = read_manifest(store)
    tensors = read_header(store / "resident.safetensors").tensors
    embedding = tensors["model.embed_tokens.record"].nbytes
    residents = sum(tensor.nbytes for tensor in tensors.values())
    experts = 4 * 3 * manifest.layers[0].record_bytes
    assert embedding == 2048 * 64 * 9 // 16  # 4.5 bits a weight
    assert token_bytes(store, manifest, 3) == residents - embedding + experts


# --- the worker


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_the_worker_measures_its_last_pass(store: Path, stage: str) -> None:
    found = measure(Job(str(store), stage, 12, 2, 1, False))
    totals = found["passes_s"]
    assert isinstance(totals, list)
    assert len(totals) == 2
    assert found["tok_s"] == pytest.approx(12 / totals[-1])
    assert "policy resident" in str(found["mode"])
    assert found["misses"] == 0
    assert found["experts_capacity"] == found["experts_total"] == 64
    # Every step of the last pass, and no step of the one before, is counted: at most 3 a layer.
    steps = 13 if stage == "decode" else 1
    assert int(str(found["requests"])) <= steps * 4 * (3 if stage == "decode" else 16)
    assert int(str(found["requests"])) > 4 * 3 * steps - 1
    assert found["counted_tokens"] == {"prefill": 12, "decode": 13}[stage]


def test_the_worker_under_a_limit_takes_the_default_policy(store: Path) -> None:
    found = measure(Job(str(store), "decode", 4, 1, 1, True))
    assert "policy tuned" in str(found["mode"])


def test_what_is_written_is_random_whatever_the_model_says(store: Path) -> None:
    engine = build(store, make_config("resident"))
    seen: list[int] = []
    try:
        engine.model.generation_config.eos_token_id = list(range(2048))  # every token ends a text
        engine.model.model.embed_tokens.register_forward_pre_hook(
            lambda module, args: seen.extend(args[0].flatten().tolist())
        )
        steps = time_pass(engine.model, "decode", 10, torch.Generator().manual_seed(3))
    finally:
        engine.close()
    ids = torch.Generator().manual_seed(3)
    forced, prompt = (torch.randint(2048, (1, n), generator=ids)[0].tolist() for n in (11, 1))
    assert seen == [*prompt, *forced[:10]]  # the last one is not read any more
    assert len(steps) == 10
    assert min(steps) > 0


@pytest.mark.skipif(not native.is_available(), reason=native.why_missing)
def test_the_worker_computes_with_the_instructions_of_whoever_runs_it(store: Path) -> None:
    before = native.core().isa()
    try:
        native.use_instructions("portable")
        (setting,) = Fate(store).settings(Cell("decode", 4, 1, None, 1), thorough=False)
        job = json.loads(setting.command[-1])
        native.use_instructions(before)
        found = measure(Job(**job))
    finally:
        native.use_instructions(before)
    assert "portable" in str(found["mode"])


def test_an_unknown_stage_is_one_line(store: Path) -> None:
    with pytest.raises(ConfigError, match="stage: 'x'"):
        measure(Job(str(store), "x", 4, 1, 1, False))


# --- rounds


@dataclass
class Scripted:
    """A rival of one shell line; it prints its tokens per second."""

    name: str
    line: str
    is_mapping: bool = False
    files: Sequence[Path] = ()

    def settings(self, cell: Cell, thorough: bool) -> list[Setting]:
        return [Setting(cell.stage, ("/bin/sh", "-c", self.line))]

    def read(self, stdout: str) -> Reading:
        if not stdout.strip():
            raise ConfigError(f"{self.name}: printed no result")
        counts = {"bytes_demand": 500, "bytes_speculated": 400, "bytes_wasted": 0,
                  "counted_tokens": 9}  # fmt: skip
        return Reading(float(stdout), counts if self.name == "fate" else {})


FORM = Form((None,), 2, 64, 8, 5.0, False)


def race(
    rivals: list[Any], form: Form = FORM, disk: Path | None = None
) -> tuple[list[Row], list[str]]:
    out = io.StringIO()
    told: list[Row] = []
    rows = run_rounds(Bench(rivals, CARD, disk, 10**9, 1), form, out, told.append, no_progress)
    assert told == rows
    return rows, out.getvalue().splitlines()


def test_rivals_take_turns_and_every_run_is_written() -> None:
    rows, lines = race([Scripted("fate", "echo 10"), Scripted("other", "echo 4")])
    order = [(row.round, row.stage, row.rival) for row in rows]
    a_round = [("prefill", "fate"), ("prefill", "other"), ("decode", "fate"), ("decode", "other")]
    assert order == [(number, *one) for number in (1, 2) for one in a_round]
    written = [json.loads(line) for line in lines]
    assert [one["tok_s"] for one in written] == [10, 4] * 4
    assert written[0]["limit_bytes"] is None


def test_the_ceiling_comes_from_what_fate_moved() -> None:
    rows, _ = race([Scripted("fate", "echo 10"), Scripted("other", "echo 4")])
    decode = [row for row in rows if row.stage == "decode"]
    assert [row.moved_bytes for row in decode] == [100] * 4  # 900 bytes, 9 tokens
    assert [row.ceiling_tok_s for row in decode] == [20] * 4  # memory takes longer than the disk
    assert [row.share for row in decode] == [0.5, 0.2] * 2
    prefill = next(row for row in rows if row.stage == "prefill")
    assert prefill.ceiling_tok_s == pytest.approx(64 / (64 * 100 / 1e9))


def test_what_fails_is_said_once_and_not_tried_again() -> None:
    rows, lines = race(
        [Scripted("broken", "echo sorry >&2; exit 2"), Scripted("mute", "true"),
         Scripted("slow", "sleep 30")],
        replace(FORM, seconds=0.4),
    )  # fmt: skip
    assert len(rows) == len(lines) == 6  # both stages, one round
    states = {row.rival: (row.state, row.why) for row in rows}
    assert states["broken"] == (FAILED, "exit code 2: sorry")
    assert states["mute"] == (FAILED, "mute: printed no result")
    assert states["slow"][0] == LATE
    assert all(row.tok_s is None for row in rows)


def test_ended_under_a_limit_is_out_of_memory() -> None:
    done = Done(-9, False, "", "", 1.0, 0, None)
    rival = Scripted("x", "")
    assert rounds._judge(rival, LIMITED, done)[0] == NO_MEMORY
    assert rounds._judge(rival, DECODE, done)[0] == FAILED
    assert rounds._judge(rival, LIMITED, replace(done, is_late=True))[0] == LATE


def test_readahead_is_tried_for_programs_that_map_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue").mkdir()
    setting = tmp_path / "queue" / "read_ahead_kb"
    setting.write_text("8192")
    monkeypatch.setattr(rounds, "run_alone", _free_of_limits)
    forgotten: list[Sequence[Path]] = []
    monkeypatch.setattr(rounds, "forget_files", forgotten.append)
    show = f"grep -q 8192 {setting} && echo 2 || echo 1"
    form = replace(FORM, limits=(GIB,), rounds=1, readahead_kib=(128, 8192))
    rivals = [Scripted("fate", show), Scripted("maps", show, is_mapping=True, files=[tmp_path])]
    rows, _ = race(rivals, form, tmp_path)
    assert [(row.rival, row.readahead_kib, row.tok_s) for row in rows if row.stage == "decode"] == [
        ("fate", None, 2), ("maps", 128, 1), ("maps", 8192, 2)
    ]  # fmt: skip
    assert setting.read_text() == "8192"
    assert forgotten.count([tmp_path]) == 4
    rows, _ = race(rivals, replace(form, limits=(None,)), tmp_path)
    assert {row.readahead_kib for row in rows} == {None}


def _free_of_limits(
    command: Sequence[str], limit_bytes: int | None, seconds: float, disk: DiskRate | None
) -> Done:
    return run_alone(command, None, seconds, None)


def test_a_prompt_under_a_limit_is_read_once() -> None:
    form = replace(FORM, limits=(None, GIB))
    runs = list(rounds._runs(Bench([Scripted("x", "")], CARD, None, 1, 1), form))
    passes = {(run.cell.limit_bytes, run.cell.stage): run.cell.passes for run in runs}
    assert passes == {(None, "prefill"): 2, (None, "decode"): 2,
                      (GIB, "prefill"): 1, (GIB, "decode"): 2}  # fmt: skip


# --- standings


def row(**changes: Any) -> Row:
    fields: dict[str, Any] = {
        "round": 1, "rival": "fate", "setting": "default", "readahead_kib": None,
        "limit_bytes": None, "stage": "decode", "tokens": 8, "state": OK, "why": "",
        "tok_s": 10.0, "ceiling_tok_s": 20.0, "share": 0.5, "moved_bytes": 0.0, "wall_s": 1.0,
        "read_bytes": 0, "peak_bytes": None, "load_average": 0.0,
    }  # fmt: skip
    return Row(**{**fields, **changes})


ROWS = [
    row(), row(round=2, tok_s=30.0, share=1.5), row(round=3, tok_s=12.0, share=0.6),
    row(rival="other", setting="a|b", tok_s=4.0, share=0.2),
    row(rival="other", setting="fast", tok_s=6.0, share=0.3, readahead_kib=128),
    row(limit_bytes=4 * GIB), row(limit_bytes=4 * GIB, rival="other", setting="mmap", state=LATE,
                                  tok_s=None, share=None),
]  # fmt: skip


def test_standings_are_medians_with_their_range() -> None:
    first = standings(ROWS)[0]
    assert (first.tok_s, first.low, first.high, first.share, first.runs) == (12, 10, 30, 0.6, 3)


def test_the_table_says_how_far_ahead_fate_is() -> None:
    text = markdown(standings(ROWS), CARD, "title")
    assert "| no limit | decode | fate | default | 12.00 | 10.00 to 30.00 | 3 | 60 % | - |" in text
    assert "| other | a\\|b | 4.00 | 4.00 to 4.00 | 1 | 20 % | 3.00x |" in text
    assert "fast, readahead 128 KiB" in text
    assert "| 4.0 GiB | decode | other | mmap | did not finish | - | 0 | - | - |" in text
    assert "10.0 GB/s on 1 thread, 20.0 GB/s on 2 threads" in text
    assert "1.00 GB/s at 4 MiB x 4" in text


def test_the_best_setting_of_each_is_drawn(tmp_path: Path) -> None:
    found = best(standings(ROWS))
    assert [(one.rival, one.tok_s) for one in found] == [
        ("fate", 12), ("other", 6), ("fate", 10), ("other", None)
    ]  # fmt: skip
    plot(standings(ROWS), tmp_path / "plot.png", "a $title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(standings(ROWS), tmp_path / "no" / "plot.png", "title")
