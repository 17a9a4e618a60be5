"""What does a person at the terminal see, and what does a program reading `--json` get?

Answers and JSON go to stdout; progress, reports and errors to stderr. Nothing moves on stderr when
it is no terminal. Exit codes: 0 ok, 2 bad input, 130 interrupted, 1 our fault.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fate_moe.config import format_bytes
from fate_moe.errors import FateError
from fate_moe.telemetry import Report

P = ParamSpec("P")
R = TypeVar("R")

stderr = Console(stderr=True, highlight=False)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn every way a command can fail into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
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
    """Print one line on stderr and end the command with `code`."""
    line = " ".join(message.split())
    print(f"fate: {line}", file=sys.stderr)  # noqa: T201 - plain: rich would wrap it
    raise typer.Exit(code)


def default_cache_dir() -> Path:
    """Return FATE_CACHE, or `fate` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FATE_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "fate"


def say(text: str) -> None:
    """Write a piece of an answer to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def emit_json(data: object) -> None:
    """Write exactly one JSON object to stdout."""
    say(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_report(rows: list[tuple[str, str]]) -> None:
    """Write (name, text) rows to stderr."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    stderr.print(table)


def report_rows(report: Report, speed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Put a run's speed before its report."""
    return speed + report.rows()


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
