"""What does a person at the terminal see, and what does a program reading `--json` get?

Answers and JSON go to stdout; progress, reports and errors to stderr. Nothing moves on stderr when
it is no terminal. Exit codes: 0 ok, 2 bad input, 130 interrupted, 1 our fault.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from types import TracebackType
from typing import ParamSpec, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fate_moe.config import format_bytes
from fate_moe.errors import CacheError, ConfigError, FateError

Rows = Sequence[tuple[str, str | None]]
"""Names and texts; a name without a text heads those that follow."""

P = ParamSpec("P")
R = TypeVar("R")

_GAP = 2  # columns of a terminal between those of a table
_LAST_WIDTH = 24  # enough for the last column of a table, which may be broken

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn every way a command can fail into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except CacheError as error:
            fail(f"{error}; this is a bug in fate", 1)
        except FateError as error:
            fail(str(error), 2)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:
            # The reader of our output left (`| head`): no error, but nothing more to say either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except typer.Exit:
            raise
        except Exception as error:  # noqa: BLE001 - the last stop of a command
            if os.environ.get("FATE_DEBUG"):
                traceback.print_exc()
            fail(
                f"internal error: {type(error).__name__}: {error}; "
                "this is a bug in fate: FATE_DEBUG=1 shows where",
                1,
            )
        raise AssertionError("unreachable")

    return run


def fail(message: str, code: int) -> None:
    """Tell what is wrong and end the command with `code`."""
    tell(" ".join(message.split()), "fate: ")
    raise typer.Exit(code)


def tell(text: str, start: str = "", *, console: Console | None = None, style: str = "") -> None:
    """Write a message to stderr, or another console.

    A terminal breaks it between words and goes on below its beginning, which is after `start`;
    elsewhere it is one line.
    """
    console = console or stderr
    if not console.is_terminal:
        print(start + text, file=console.file)
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(start), Text(text, style))  # a Text is taken literally
    console.print(grid)


def default_cache_dir() -> Path:
    """Return FATE_CACHE, or ~/.cache/fate as `fate_moe.load` does."""
    from fate_moe.engine.prepare import default_cache_dir as library_default

    own = os.environ.get("FATE_CACHE")
    return Path(own).expanduser() if own else library_default()


def readable(text: str, what: str) -> str:
    """Return text that can be written as UTF-8.

    Raises:
        ConfigError: it came from bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what}: it is no UTF-8 text") from error
    return text


def say(text: str) -> None:
    """Write a piece of an answer to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def emit_json(data: object) -> None:
    """Write exactly one JSON object to stdout."""
    say(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_report(rows: Rows) -> None:
    """Write rows to stderr."""
    show_rows(rows, stderr)


def show_rows(rows: Rows, console: Console) -> None:
    """Write rows: a table on a terminal, one plain line each elsewhere."""
    if not console.is_terminal:
        for name, text in rows:
            print(f"{name}:" if text is None else f"{name}: {text}", file=console.file)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        # A Text is taken literally: paths may have brackets.
        cells = ("", Text(name, "bold")) if text is None else (Text(name), Text(text))
        table.add_row(*cells)
    console.print(table)


def show_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    least: Sequence[str] = (),
    plain: str | None = None,
) -> list[str]:
    """Write rows under a head to stdout: drawn on a terminal, as plain text elsewhere.

    The last column takes what width is left; the others are never broken.

    Args:
        least: columns that a terminal too narrow for all leaves out, the first of these first.
        plain: what is written where there is no terminal; None: the rows, tab-separated.
    Returns:
        The columns that were left out.
    """
    if not stdout.is_terminal:
        lines = "".join("\t".join(row) + "\n" for row in (head, *rows))
        say(lines if plain is None else plain)
        return []
    widths = {
        name: max(cell_len(text) for text in (*name.split(), *(row[place] for row in rows)))
        for place, name in enumerate(head)
    }
    left_out = _left_out(widths, least)
    kept = [place for place, name in enumerate(head) if name not in left_out]
    table = Table(box=None, header_style="bold cyan", padding=(0, _GAP, 0, 0), pad_edge=False)
    for place in kept:
        name = "\n".join(wrap(head[place], widths[head[place]], break_long_words=False))
        table.add_column(name, overflow="fold", no_wrap=place != kept[-1])
    for row in rows:
        table.add_row(*(Text(row[place]) for place in kept))
    stdout.print(table)
    return left_out


def _left_out(widths: dict[str, int], least: Sequence[str]) -> list[str]:
    """Return which of the columns `least` have to go for the others to fit."""
    left_out: list[str] = []
    for name in (*least, ""):
        kept = [width for one, width in widths.items() if one not in left_out]
        kept[-1] = min(kept[-1], _LAST_WIDTH)
        if sum(kept) + _GAP * (len(kept) - 1) <= stdout.width:
            break
        left_out += [name] if name else []
    return left_out


class PromptBar:
    """A progress bar for a prompt that takes a while to read, gone before the answer begins."""

    def __init__(self, patience_s: float = 0.5) -> None:
        """Show nothing of a prompt that is read sooner than `patience_s`."""
        self._patience_s = patience_s
        self._began_s: float | None = None
        self._progress: TerminalProgress | None = None

    def __enter__(self) -> PromptBar:
        return self

    def __exit__(self, *about: object) -> None:
        self._close()

    def tell(self, done: int, total: int) -> None:
        """Show how many tokens are read."""
        now_s = time.perf_counter()
        self._began_s = self._began_s or now_s
        if now_s - self._began_s < self._patience_s:
            return
        if self._progress is None:
            self._progress = TerminalProgress()
            self._progress.__enter__()
        self._progress("reading the prompt", done, total)

    def before(self, show: Callable[[str], None]) -> Callable[[str], None]:
        """Return a function that takes the bar away and shows a piece of the answer."""

        def on_text(piece: str) -> None:
            self._close()
            show(piece)

        return on_text

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


class TerminalProgress:
    """A progress bar per long job, on stderr, gone when the jobs are done.

    Silent when stderr is no terminal. Use as a context manager; the instance is a `Progress`.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("[bold cyan]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        amount = f"{done} of {total}"
        if total >= 2**20:  # bytes
            amount = f"{format_bytes(done)} of {format_bytes(total)}"
        whole = total if total > 1 else None  # one step has no half: the bar pulses
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=whole, amount="")
        self._bars.update(
            self._tasks[what],
            completed=done,
            total=whole,
            amount=amount if whole else "",
        )
        if done >= total:
            self._bars.update(self._tasks[what], visible=False)
