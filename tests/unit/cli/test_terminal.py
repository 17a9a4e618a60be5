"""On a terminal lines end between words, and tables fit; elsewhere everything is as it was."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fate_moe.bench.policies import BOUND, Row
from fate_moe.bench.policies_present import markdown
from fate_moe.bench.rounds import Bench
from fate_moe.cli import app, bench, chat, policies, stores, terminal
from fate_moe.cli.terminal import fail, show_table, tell
from tests.unit.bench.test_rivals import CARD, ROWS

WIDTH = 60


def screen(monkeypatch: pytest.MonkeyPatch, width: int = WIDTH) -> io.StringIO:
    """Make both consoles terminals of some columns; return what they show."""
    out = io.StringIO()
    for name in ("stdout", "stderr"):
        console = Console(file=out, force_terminal=True, width=width, highlight=False)
        monkeypatch.setattr(terminal, name, console)
    return out


def shown(out: io.StringIO) -> list[str]:
    return [
        line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()
    ]


def test_a_message_is_broken_between_words_under_its_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "ram: have 10.0 MiB, need at least 1.2 GiB [of all]; try --ram 1300MiB or fewer experts"
    tell(words, "fate: ")
    assert capsys.readouterr().err == f"fate: {words}\n"
    out = screen(monkeypatch)
    with pytest.raises(Exception, match="2"):
        fail(words, 2)
    first, second = shown(out)
    assert first.startswith("fate: ram: have")
    assert second.startswith("      ")
    assert f"{first} {second.strip()}" == f"fate: {words}"
    assert max(map(len, (first, second))) <= WIDTH


def test_chat_breaks_its_own_words_and_never_the_models(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "hello\n/stats\n/help\n/nonsense\n" + 300 * "a" + "\n/quit\n"
    asked = ["chat", str(tiny_store), "-n", "120", "--context", "200"]
    plain = CliRunner().invoke(app, asked, input=typed)
    out = screen(monkeypatch)
    monkeypatch.setattr(chat, "stderr", terminal.stderr)
    result = CliRunner().invoke(app, asked, input=typed)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout
    assert max(map(len, result.stdout.split("\n"))) > WIDTH
    lines = shown(out)
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    assert text.count(chat.HELP) == 3  # at first, for /help, and for what is no command
    assert "the context takes 200" in text
    headings = [line.strip() for line in lines if re.fullmatch(" +(last|all) answer.*", line)]
    assert headings == ["last answer", "all answers since the start"]
    mode = next(place for place, line in enumerate(lines) if line.lstrip().startswith("mode  "))
    indent = lines[mode].index("policy")
    assert lines[mode + 1].startswith(" " * indent)
    assert lines[mode + 1][indent] != " "


def test_a_table_that_is_too_wide_breaks_its_head_and_leaves_columns_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ("name", "tokens a second", "range", "note")
    rows = [
        ("one", "12.5", "10.00 to 14.00", "first"),
        ("two", "7.25", "-", "second of them, and what it is"),
    ]
    assert show_table(head, rows, least=("range",)) == []
    assert capsys.readouterr().out == "".join("\t".join(row) + "\n" for row in (head, *rows))
    assert show_table(head, rows, least=("range",), plain="| so |\n") == []
    assert capsys.readouterr().out == "| so |\n"
    out = screen(monkeypatch, 64)
    assert show_table(head, rows, least=("range",)) == []
    assert shown(out) == [
        "      tokens",
        "      a",
        "name  second  range           note",
        "one   12.5    10.00 to 14.00  first",
        "two   7.25    -               second of them, and what it is",
    ]
    out = screen(monkeypatch, 38)
    assert show_table(head, rows, least=("range", "note")) == ["range"]
    assert shown(out)[-2:] == ["two   7.25    second of them, and what", "              it is"]


def rows() -> list[Row]:
    def row(policy: str, number: int) -> Row:
        rates = None if policy == BOUND else 0.97
        return Row(number, policy, 0.5, 2e8, 123.4, 20.0 + number, rates, rates, rates, 3e6, rates,
                   "", None if policy == BOUND else 1e6)  # fmt: skip

    return [row(BOUND, 0)] + [row(p, n) for n in (1, 2, 3) for p in ("demand", "fate", "tuned")]


def test_the_readme_shows_a_report_as_a_terminal_does(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(__file__).parents[3] / "README.md"
    sample = next(
        block.strip("\n").splitlines()[1:]  # after the answer
        for block in readme.read_text(encoding="utf-8").split("```")
        if "hit rate" in block
    )
    begin = sample[0].index("prefill") + len("prefill") + 2
    rows: list[tuple[str, str]] = []
    for line in sample:
        name, text = line[: begin - 2].strip(), line[begin:]
        rows += [(name, text)] if name else [(rows[-1][0], f"{rows.pop()[1]} {text}")]
    out = screen(monkeypatch, 100)
    terminal.show_report(rows)
    assert shown(out) == sample
    out = screen(monkeypatch, 100)
    asked = ["generate", str(tiny_store), "-p", "hello", "--experts", "50%", "-n", "8"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    names = [line.strip().split("  ")[0] for line in shown(out) if line[:17].strip()]
    assert names[-len(rows) :] == [name for name, _ in rows]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_policies_are_compared_in_a_table_that_fits(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policies._show(rows(), tmp_path, "title", json_out=False)
    assert capsys.readouterr().out == markdown(rows())
    out = screen(monkeypatch, width)
    policies._show(rows(), tmp_path, "title", json_out=False)
    lines = shown(out)
    assert max(map(len, lines)) <= width
    assert "|" not in out.getvalue()
    line = next(line.split() for line in lines if "tuned" in line)
    assert line[:6] == ["0.2", "GB/s", "50", "%", "tuned", "22.00"]
    assert line[-6:] == ["1.00x", "1.00", "to", "1.00", "110", "%"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == f"# title\n\n{markdown(rows())}"
    text = " ".join(" ".join(lines).split())
    assert ("table.md has them" in text) == (width < 160)
    assert ("MiB a prompt" in text.split("left out")[0]) == (width == 160)


def test_no_column_is_left_out_untold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [replace(row, policy="tuned+predictor=cross_layer") for row in rows()[1:]]
    out = screen(monkeypatch, 80)
    policies._show(long, tmp_path, "title", json_out=False)
    lines = shown(out)
    head = " ".join(" ".join(lines[: lines.index(next(x for x in lines if "tuned" in x))]).split())
    first = next(number for number, line in enumerate(lines) if line.startswith("left out"))
    told = " ".join(lines[first:])
    for name in ("decode", "quartiles", "hit", "late", "recall", "stall", "bound", "against"):
        assert (name in head) != (name in told), name


@pytest.mark.parametrize("width", [80, 160])
def test_rivals_are_compared_in_a_table_that_fits(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Bench([], CARD, None, 1, 1)
    bench._show(ROWS, where, tmp_path, "title", json_out=False)
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text(encoding="utf-8")
    out = screen(monkeypatch, width)
    monkeypatch.setattr(bench, "stdout", terminal.stdout)
    bench._show(ROWS, where, tmp_path, "title", json_out=False)
    lines = shown(out)
    assert max(map(len, lines)) <= width
    assert lines[0] == "- processor: Chip, 2 cores, avx2"
    line = next(line for line in lines if "a|b" in line)
    assert line.split()[:6] == ["no", "limit", "decode", "other", "a|b", "4.00"]
    assert ("10.00 to 30.00" in out.getvalue()) == (width == 160)


def test_what_goes_to_stdout_is_broken_between_words_too(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = screen(monkeypatch, 24)
    monkeypatch.setattr(stores, "stdout", terminal.stdout)
    assert CliRunner().invoke(app, ["verify", str(tiny_store)]).exit_code == 0
    text = " ".join(" ".join(shown(out)).split())
    assert "records intact, " in text
    assert max(map(len, shown(out))) <= 24
