"""The bar of a long prompt is there while it is read, and gone before the answer."""

import io

import pytest
from rich.console import Console

from fate_moe.cli import terminal
from fate_moe.cli.terminal import PromptBar


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", Console(file=out, force_terminal=True, width=80))
    return out


def test_it_shows_tokens_and_goes_before_the_first_piece(screen: io.StringIO) -> None:
    pieces: list[str] = []
    with PromptBar(patience_s=0) as bar:
        on_text = bar.before(lambda piece: pieces.append(piece + screen.getvalue()[-4:]))
        bar.tell(0, 1500)
        bar.tell(512, 1500)
        on_text("a")
        end = screen.getvalue()
        on_text("b")
        assert screen.getvalue() == end  # nothing more is drawn
    assert "reading the prompt" in end
    assert "512 of 1500" in end
    assert [piece[0] for piece in pieces] == ["a", "b"]
    assert end.endswith(pieces[0][1:])


def test_it_goes_when_reading_fails(screen: io.StringIO) -> None:
    def read(bar: PromptBar) -> None:
        bar.tell(0, 1500)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), PromptBar(patience_s=0) as bar:
        read(bar)
    assert bar._progress is None


def test_a_short_prompt_shows_none(screen: io.StringIO) -> None:
    with PromptBar() as bar:
        for done in range(3):
            bar.tell(done, 3)
        bar.before(lambda piece: None)("a")
    assert screen.getvalue() == ""


def test_a_slow_prompt_shows_one(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.4, 10.6])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(times))
    with PromptBar() as bar:
        bar.tell(0, 1500)
        bar.tell(100, 1500)
        assert screen.getvalue() == ""
        monkeypatch.setattr(terminal.time, "perf_counter", lambda: 10.6)
        bar.tell(200, 1500)
    assert "200 of 1500" in screen.getvalue()
