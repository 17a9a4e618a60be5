"""Which commands are there?"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from fate_moe import __version__

app = typer.Typer(
    name="fate",
    help="Run any Mixture-of-Experts language model in a fraction of its memory.",
    no_args_is_help=False,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run any Mixture-of-Experts language model in a fraction of its memory."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _bounds(error: Exception) -> str | None:
    """Say in our words which number an option takes; None where it is about something else.

    The parser of options asks pydantic, whose words name neither the number nor both bounds.
    """
    option: Any = getattr(error, "param", None)
    causes: Any = getattr(error.__cause__, "errors", None)
    if option is None or causes is None:
        return None
    first, low, high = causes()[0], getattr(option, "min", None), getattr(option, "max", None)
    kinds = {"int": "a whole number", "float": "a number"}
    kind = kinds.get(first["type"].split("_")[0])  # such as int_parsing
    if kind is None and not first["type"].endswith("than_equal"):
        return None
    span = None
    if low is not None:
        span = f"{low:.10g} or more" if high is None else f"{low:.10g} to {high:.10g}"
    need = ", ".join(part for part in (kind, span) if part)
    name = max(option.opts, key=len).lstrip("-")
    return f"{name}: have {first['input']!s:.40}, need {need}"


def main() -> None:
    """Run the command line."""
    # Before torch is loaded: threads that spin at barriers make small operations several times
    # slower as soon as another process wants a core (docs/experiments.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Commands register themselves; imported here so that `import fate_moe.cli` stays cheap.
    from fate_moe import native
    from fate_moe.cli import (  # noqa: F401
        bench,
        calibrate,
        chat,
        eval,
        generate,
        models,
        policies,
        simulate,
        stores,
        trace,
    )
    from fate_moe.cli.terminal import tell
    from fate_moe.errors import FateError

    if isa := os.environ.get("FATE_ISA"):
        try:
            native.use_instructions(isa)
        except FateError as error:
            tell(f"FATE_ISA: {error}", "fate: ")
            sys.exit(2)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # What the option parser has to say, in one line instead of a box.
        message = _bounds(error) or getattr(error, "format_message", lambda: "")()
        if not message:
            raise
        tell(f"{' '.join(message.split()).rstrip('.')}; try fate --help", "fate: ")
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
