"""The command line as a person and a program meet it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner, Result

from fate_moe import __version__
from fate_moe.cli import app, chat, generate, stores  # noqa: F401
from fate_moe.config import PRESETS, make_config
from fate_moe.engine.generate import Answer, Sampling
from tests import tiny

CONTRACT = {
    "text", "mode", "prompt_tokens", "new_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s",
    "requests", "hits", "late", "misses", "hit_rate", "recall", "coverage", "accuracy",
    "bytes_demand", "bytes_speculated", "bytes_wasted", "stall_s", "experts_capacity",
    "working_set", "budget_bytes", "peak_rss_bytes",
}  # fmt: skip


def fate(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def refused(result: Result, message: str) -> None:
    """One clear line on stderr, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fate: ")
    assert re.search(message, lines[0]), lines[0]


def test_prompts_in_two_bits_are_asked_for_and_named(store: str) -> None:
    result = fate("generate", store, "-p", "hello", "-n", "3", "--int2-share", "30%", "--json")
    assert result.exit_code == 0
    assert "at most 30% of the routed tokens" in json.loads(result.stdout)["mode"]
    for wrong in ("6MiB", "120%", "much"):
        refused(fate("generate", store, "-p", "x", "--int2-share", wrong), "int2-share: ")


def test_two_bits_on_a_miss_are_asked_for_and_named_and_exact_forbids_them(store: str) -> None:
    ask = ("generate", store, "-p", "hello", "-n", "9", "--experts", "20%", "--policy", "demand")
    for flags in ((), ("--exact",)):
        mode = json.loads(fate(*ask, *flags, "--json").stdout)["mode"]
        assert mode.endswith("exact: the answer does not depend on what is in memory")
    data = json.loads(fate(*ask, "--int2-on-miss", "40%", "--json").stdout)
    assert "in decode experts below 40% of a token's router weights" in data["mode"]
    assert "exact" not in data["mode"]
    for command in ("generate", "chat"):
        both = (command, "no-such-model", "--int2-on-miss", "15%", "--exact")
        prompt = ("-p", "x") if command == "generate" else ()
        refused(fate(*both, *prompt), "exact: with int2_on_miss 15% .* --exact and --int2-on-miss")
    for wrong in ("6MiB", "120%", "much"):
        refused(fate("generate", store, "-p", "x", "--int2-on-miss", wrong), "int2-on-miss: ")


def test_a_routing_bias_is_asked_for_and_named_and_exact_forbids_it(store: str) -> None:
    ask = ("generate", store, "-p", "hello", "-n", "9", "--experts", "50%", "--allocation", "even")
    data = json.loads(fate(*ask, "--routing-bias", "99.5", "--json").stdout)
    assert "logits of experts in memory raised by 99.5" in data["mode"]
    assert data["rerouted"] == data["phases"]["decode"]["rerouted"] > 0
    refused(fate(*ask, "--routing-bias", "1", "--exact"), "--exact and --routing-bias")
    refused(fate(*ask, "--routing-bias", "-1"), "routing_bias: have -1.0, need 0 or more")


@pytest.fixture
def store(tiny_store: Path) -> str:
    return str(tiny_store)


def test_json_holds_every_key_of_the_contract(store: str) -> None:
    result = fate("generate", store, "-p", "hello", "--experts", "50%", "-n", "12", "--json")
    assert result.exit_code == 0
    data: dict[str, Any] = json.loads(result.stdout)
    assert data.keys() >= CONTRACT
    assert data["hits"] + data["late"] + data["misses"] == data["requests"] > 0
    assert data["hit_rate"] == data["hits"] / data["requests"]
    assert data["bytes_demand"] == data["misses"] * data["expert_bytes"]
    assert data["bytes_speculated"] == data["guesses"] * data["expert_bytes"]
    assert data["experts_capacity"] == tiny.LAYERS * tiny.EXPERTS // 2
    assert data["working_set"] == tiny.LAYERS * tiny.TOP_K
    assert data["new_tokens"] <= 12
    for phase in ("prefill", "decode"):
        part = data["phases"][phase]
        assert part["hits"] + part["late"] + part["misses"] == part["requests"]
        assert 0 <= part["stall_s"] < part["lease_s"]
    rows = data["per_layer"]
    assert sum(row["requests"] for row in rows) == data["requests"]
    assert rows[0]["recall"] is None  # nothing predicts the first layer
    assert 0 < rows[1]["recall_top_k"] <= rows[1]["recall"] <= 1


def test_the_answer_goes_to_stdout_and_the_report_to_stderr(store: str) -> None:
    result = fate("generate", store, "-p", "hello", "--experts", "25%", "-n", "8")
    assert result.exit_code == 0
    as_json = json.loads(
        fate("generate", store, "-p", "hello", "--experts", "25%", "-n", "8", "--json").stdout
    )
    assert result.stdout == as_json["text"] + "\n"
    for word in ("mode", "decode", "requests", "hit rate", "recall", "stall", "peak"):
        assert word in result.stderr


def test_policies_agree(store: str) -> None:
    texts = {
        policy: json.loads(
            fate("generate", store, "-p", "agree", "-n", "16", "--json", "--policy", policy,
                 *([] if policy == "resident" else ["--experts", "25%"])).stdout
        )["token_ids"]
        for policy in ("tuned", "fate", "demand", "resident")
    }  # fmt: skip
    assert len(set(map(tuple, texts.values()))) == 1


def test_the_prompt_may_come_from_stdin(store: str) -> None:
    from_stdin = fate("generate", store, "-n", "8", "--raw", stdin="once upon")
    from_option = fate("generate", store, "-n", "8", "--raw", "-p", "once upon")
    assert from_stdin.stdout == from_option.stdout != ""


def test_sampling_is_repeatable_by_seed(store: str) -> None:
    def sample(seed: str) -> str:
        return fate("generate", store, "-p", "x", "-n", "24", "--temperature", "1.5",
                    "--seed", seed).stdout  # fmt: skip

    assert sample("1") == sample("1") != sample("2")


def test_chat_remembers_and_reports(store: str) -> None:
    lines = "first\n/stats\n/nonsense\nsecond\n/reset\nfirst\n/quit\nnever\n"
    result = fate("chat", store, "--experts", "25%", "-n", "8", stdin=lines)
    assert result.exit_code == 0
    assert "hit rate" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert "forgotten" in result.stderr
    answers = result.stdout
    alone = fate("generate", store, "--experts", "25%", "-n", "8", "-p", "first").stdout
    assert answers.startswith(alone)
    assert answers.endswith(alone)  # after /reset the same question gets the same answer


def test_stats_tell_the_last_answer_from_all_of_them(store: str) -> None:
    lines = "first\n/stats\nsecond\n/stats\n/reset\n/stats\n/quit\n"
    result = fate("chat", store, "-n", "8", stdin=lines)
    assert result.exit_code == 0
    before, after = result.stderr.split("forgotten\n")
    _, *shown = before.split("last answer:\n")
    assert len(shown) == 2
    for one in shown:
        last, every = one.split("all answers since the start:\n")
        assert [line.split(":")[0] for line in last.splitlines()] == ["prefill", "decode"]
        assert every.startswith("mode: ")
        assert "requests: 0 = " not in every
    assert after.startswith("all answers since /reset:\nmode: ")  # none was given
    assert "requests: 0 = " in after


@pytest.mark.parametrize(
    ("reached", "allowed", "shown"),
    [
        (10.0, 30.0, "8 tokens, 10.0 tok/s (link allows 30.0 tok/s)"),
        (10.0, 100.0, "8 tokens, 10.0 tok/s (link allows 100.0 tok/s)"),
        (10.0, 101.0, "8 tokens, 10.0 tok/s"),  # no limit worth a word
        (10.0, None, "8 tokens, 10.0 tok/s"),  # nothing was moved
        (None, None, "8 tokens"),
    ],
)
def test_the_links_rate_is_named_where_it_limits(
    reached: float | None, allowed: float | None, shown: str
) -> None:
    answer = Answer("", (), 3, 8, 0.1, 30.0, reached, allowed)
    assert dict(generate.speed_rows(answer))["decode"] == shown


def test_a_conversation_longer_than_the_context_can_be_reset(store: str) -> None:
    result = fate("chat", store, "-n", "4", "--context", "40", stdin=f"{'a' * 90}\n/reset\nhi\n")
    assert result.exit_code == 0
    assert "the context takes 40" in result.stderr
    assert len(result.stdout) > 1


def test_convert_inspect_verify(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    made = fate("convert", str(tiny_checkpoint), str(out), "--group-size", "32", "--json")
    assert made.exit_code == 0
    shown = json.loads(fate("inspect", str(out), "--json").stdout)
    assert shown == json.loads(made.stdout)
    assert shown["experts"] == tiny.LAYERS * tiny.EXPERTS
    assert shown["quantization"]["group"] == 32
    assert str(out) in fate("inspect", str(out)).stdout
    checked = fate("verify", str(out))
    assert checked.exit_code == 0
    assert f"{tiny.LAYERS * tiny.EXPERTS} records intact" in checked.stdout
    again = fate("convert", str(tiny_checkpoint), str(out), "--group-size", "32")
    assert again.exit_code == 0
    refused(
        fate("convert", str(tiny_checkpoint), str(out), "--group-size", "64"),
        "other content or options",
    )


@pytest.mark.parametrize(
    ("options", "quantization", "mode"),
    [
        (["--bits", "8"], {"bits": 8, "group": 64, "balanced": True}, "experts INT8, computed"),
        (
            ["--scales", "minmax"],
            {"bits": 4, "group": 64, "scales": "minmax"},
            "experts INT4 (min-max scales), computed",
        ),
        (["--bits", "16"], {"bits": 32}, "experts unquantized (float32), computed in"),
    ],
    ids=["8 bits", "minmax", "16 bits"],
)
def test_convert_to_other_settings(
    options: list[str],
    quantization: dict[str, object],
    mode: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    out = str(tmp_path / "store")
    made = fate("convert", str(tiny_checkpoint), out, *options, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["quantization"] == quantization
    assert ("INT2 head" in fate("inspect", out).stdout) == (quantization["bits"] == 4)
    assert fate("verify", out).exit_code == 0
    result = fate("generate", out, "-p", "hello", "--experts", "50%", "-n", "8", "--json")
    assert result.exit_code == 0, result.output
    assert mode in json.loads(result.stdout)["mode"]


def test_convert_with_any_number_of_jobs_makes_the_same_store(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    made = []
    for jobs in ("1", "4"):
        out = tmp_path / jobs
        assert fate("convert", str(tiny_checkpoint), str(out), "--jobs", jobs).exit_code == 0
        made.append((out / "fate.json").read_bytes())  # holds every record's checksum
    assert made[0] == made[1]


def test_verify_names_a_flipped_byte(tiny_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    shutil.copytree(tiny_store, out)
    with (out / "experts-00002.safetensors").open("r+b") as file:
        file.seek(4096 * 3 + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    result = fate("verify", str(out))
    assert result.exit_code == 2
    assert re.search(r"layer 2, expert \d+: experts-00002", result.stdout)
    assert len(result.stderr.strip().splitlines()) == 1
    data = json.loads(fate("verify", str(out), "--json").stdout)
    assert data["intact"] is False
    assert len(data["findings"]) == 1


def test_a_model_by_name_is_converted_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        done = fate("generate", str(tiny_checkpoint), "-p", "x", "-n", "2",
                    "--cache-dir", str(cache))  # fmt: skip
        assert done.exit_code == 0
    assert len(list((cache / "stores").glob("*/fate.json"))) == 1


def dense(folder: Path) -> Path:
    config = AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        intermediate_size=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class TestBadInput:
    """What, which, have/need, what to try."""

    def test_unknown_model(self) -> None:
        refused(fate("generate", "smolmo", "-p", "x"), "smolmo: no such folder; give smolmoe")

    def test_unreachable_hub(self) -> None:
        refused(fate("generate", "no/such-model", "-p", "x"), "no/such-model: .*hub")

    def test_not_an_moe(self, tmp_path: Path) -> None:
        refused(fate("convert", str(dense(tmp_path / "m")), str(tmp_path / "s")), "llama.*")
        assert not (tmp_path / "s").exists()

    def test_empty_folder(self, tmp_path: Path) -> None:
        refused(fate("convert", str(tmp_path)), "neither config.json nor fate.json")

    def test_missing_shard(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(tiny_checkpoint, tmp_path / "m")
        (broken / "model.safetensors").unlink()
        refused(fate("convert", str(broken), str(tmp_path / "s")), "safetensors")
        assert not (tmp_path / "s").exists()

    def test_truncated_shard(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(tiny_checkpoint, tmp_path / "m")
        shard = broken / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        refused(fate("convert", str(broken), str(tmp_path / "s")), "model.safetensors")
        assert not (tmp_path / "s").exists()

    def test_truncated_store(self, tiny_store: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(tiny_store, tmp_path / "s")
        layer = broken / "experts-00003.safetensors"
        layer.write_bytes(layer.read_bytes()[:-4096])
        refused(fate("generate", str(broken), "-p", "x"), "experts-00003.safetensors")

    def test_broken_manifest(self, tiny_store: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(tiny_store, tmp_path / "s")
        (broken / "fate.json").write_text("{")
        refused(fate("inspect", str(broken)), "fate.json")

    def test_budget_below_the_floor(self, store: str) -> None:
        refused(
            fate("generate", store, "-p", "x", "--ram", "10MiB"),
            r"ram: have 10\.0 MiB, need at least .*; try --ram \d+MiB",
        )

    def test_bad_size(self, store: str) -> None:
        refused(fate("generate", store, "-p", "x", "--ram", "lots"), "ram: cannot read 'lots'")

    def test_unwritable_cache_folder(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused(
            fate("generate", str(tiny_checkpoint), "-p", "x", "--cache-dir",
                 str(tmp_path / "file" / "cache")),
            "file/cache",
        )  # fmt: skip

    def test_prompt_longer_than_the_context(self, store: str) -> None:
        refused(
            fate("generate", store, "-p", "a" * 300, "--raw"), "prompt: 300 tokens, .* takes 256"
        )
        refused(
            fate("generate", store, "-p", "a" * 50, "--raw", "--context", "50"), "prompt: 50 tokens"
        )

    def test_context_longer_than_the_model(self, store: str) -> None:
        refused(fate("generate", store, "-p", "x", "--context", "999"), "at most 256")

    def test_empty_prompt(self, store: str) -> None:
        refused(fate("generate", store, "-p", "  "), "prompt: it is empty")

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--policy", "quick", "'quick' is none of demand, fate, path, resident"),
            ("--cache", "mru", "'mru' is none of arc, guarded"),
            ("--predictor", "luck", "'luck' is none of cross_layer, history, none"),
            ("--allocation", "deep", "'deep' is none of even, global, shallow"),
            ("--dtype", "int3", "'int3' is none of"),
            ("--temperature", "nan", "temperature"),
            ("--top-p", "0", "top-p"),
            ("--max-new-tokens", "0", "max-new-tokens"),
            ("--seed", str(10**30), "seed"),
            ("--threads", str(10**12), "threads"),
            ("--ram", "9" * 310, "more than any machine has"),
            ("--experts", "0%", "experts: have 0 slots"),
        ],
    )
    def test_bad_choices(self, option: str, value: str, message: str, store: str) -> None:
        refused(fate("generate", store, "-p", "x", option, value), message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--bits", "5"], "bits: 5 is none of 4, 8, 16"),
            (["--bits", "32"], "bits: 32 is none of 4, 8, 16"),
            (["--jobs", "0"], "jobs: have 0, need 1 to 256"),
            (["--jobs", "1000"], "jobs: have 1000, need 1 to 256"),
            (["--scales", "best"], "scales: 'best' is none of fitted, minmax"),
            (["--bits", "16", "--scales", "minmax"], "scales: minmax needs 4 or 8 bits, have 16"),
        ],
    )
    def test_bad_settings_of_a_store(
        self, options: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "s"
        refused(fate("convert", str(tiny_checkpoint), str(out), *options), message)
        assert not out.exists()

    def test_no_store_to_inspect(self, tmp_path: Path) -> None:
        refused(fate("inspect", "smolmoe", "--cache-dir", str(tmp_path)), "run fate convert")

    def test_a_store_is_no_checkpoint(self, store: str) -> None:
        refused(fate("convert", store), "is a store already")


def test_help_has_examples_and_every_command() -> None:
    text = fate("--help").stdout
    for command in ("generate", "chat", "convert", "inspect", "verify"):
        assert command in text
        assert "fate " + command in fate(command, "--help").stdout


@pytest.mark.parametrize(
    ("option", "section"),
    [("predictor", "predict"), ("cache", "cache"), ("allocation", "cache")],
)
def test_help_says_what_each_policy_takes_by_default(option: str, section: str) -> None:
    command = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    text = next(found.help for found in command.params if found.name == option)
    for policy in PRESETS:
        default = getattr(getattr(make_config(policy), section), option)
        assert re.search(rf"Default: .*\b{default} \([^)]*\b{policy}\b", text), (policy, text)


def test_version() -> None:
    assert fate("--version").stdout.strip() == f"fate {__version__}"


def test_our_own_faults_exit_with_1(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fate_moe

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(fate_moe, "load", broken, raising=False)
    result = fate("generate", store, "-p", "x")
    assert result.exit_code == 1
    assert "internal error: KeyError" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_group_without_a_command_shows_its_help() -> None:
    from fate_moe.cli import bench as _bench  # noqa: F401 - registers the command

    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "policies" in result.output or "rivals" in result.output


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_not_there_is_not_to_be_converted(command: str, tmp_path: Path) -> None:
    refused(CliRunner().invoke(app, [command, str(tmp_path / "none")]), "none: no such folder")


def test_an_answer_that_was_stopped_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped:
        def ask(self, *asked: object) -> Answer:
            raise KeyboardInterrupt

    dialogue = chat.Dialogue(Stopped(), Sampling(), [])  # type: ignore[arg-type]
    dialogue._last = Answer("", (), 3, 8, 0.1, 30.0, 10.0, None)
    dialogue._turn("hello")
    assert dialogue._last is None
    assert "stopped" in capsys.readouterr().err
