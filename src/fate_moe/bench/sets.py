"""What do evaluation files look like, and can they be trusted?

Text: a UTF-8 file, plain or .xz. Questions: one JSON object a line, either

    {"query": "Question: ...\\nAnswer:", "choices": ["one", "two"], "gold": 0}
    {"context": "He looked at", "continuation": " her"}

Fields beyond these are ignored. Everything that is read has a bound.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fate_moe.errors import ConfigError, reason

MAX_TEXT_CHARS = 1 << 24  # about four million tokens
MAX_LINE_CHARS = 1 << 20
MAX_QUESTIONS = 100_000
MAX_CHOICES = 64
_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True, slots=True)
class Choice:
    """A question, its possible answers, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class LastWord:
    """A passage and how it goes on."""

    context: str
    continuation: str


Questions = tuple[Choice, ...] | tuple[LastWord, ...]


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ConfigError: it cannot be read, is no UTF-8, is empty, or too long.
    """
    try:
        with _open(path) as file:
            text = file.read(MAX_TEXT_CHARS + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is no UTF-8 text: {error.reason}") from error
    if len(text) > MAX_TEXT_CHARS:
        raise ConfigError(f"{path}: longer than {MAX_TEXT_CHARS} characters; give a part of it")
    if not text.strip():
        raise ConfigError(f"{path}: it is empty")
    return text


def read_questions(path: Path, limit: int | None = None) -> Questions:
    """Read a file of multiple-choice questions or of last words; its first line says which.

    Args:
        limit: most questions; None = all of them.
    Raises:
        ConfigError: it cannot be read, or a line is none of the two forms; names file and line.
    """
    most = MAX_QUESTIONS + 1 if limit is None else limit
    found: list[Choice | LastWord] = []
    try:
        for number, line in _lines(path):
            if len(found) == most:
                break
            found.append(_question(f"{path}: line {number}", line))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is no UTF-8 text: {error.reason}") from error
    if len(found) > MAX_QUESTIONS:
        raise ConfigError(f"{path}: over {MAX_QUESTIONS} questions; give --limit or a part of it")
    if not found:
        raise ConfigError(f"{path}: it holds no question")
    if len({type(one) for one in found}) > 1:
        raise ConfigError(f"{path}: it mixes choices and last words; give two files")
    return tuple(found)  # type: ignore[return-value]


def own_text() -> str:
    """Return the short text that comes along: written for Fate, of several kinds."""
    return (_DATA / "text.txt").read_text(encoding="utf-8")


def own_json_prompts() -> tuple[str, ...]:
    """Return the 40 fixed prompts that ask for JSON."""
    return tuple((_DATA / "json_prompts.txt").read_text(encoding="utf-8").splitlines())


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        number = total = 0
        while line := file.readline(MAX_LINE_CHARS + 1):
            number += 1
            total += len(line)
            if len(line) > MAX_LINE_CHARS:
                raise ConfigError(f"{path}: line {number} is longer than {MAX_LINE_CHARS}")
            if total > MAX_TEXT_CHARS:
                raise ConfigError(
                    f"{path}: longer than {MAX_TEXT_CHARS} characters; give --limit or a part of it"
                )
            if line.strip():
                yield number, line


def _question(where: str, line: str) -> Choice | LastWord:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: must be an object, is {type(fields).__name__}")
    if "context" in fields:
        return LastWord(_text(where, fields, "context"), _text(where, fields, "continuation"))
    choices, gold = fields.get("choices"), fields.get("gold")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
        raise ConfigError(f"{where}: choices must be a list of 2 to {MAX_CHOICES} texts")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError(f"{where}: choices must be texts that are not empty")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ConfigError(f"{where}: gold must be an index into choices, is {gold!r:.40}")
    choices = tuple(_readable(where, "a choice", choice) for choice in choices)
    return Choice(_text(where, fields, "query"), choices, gold)


def _text(where: str, fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name} must be text, is {value!r:.40}")
    return _readable(where, name, value)


def _readable(where: str, name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can spell it
        raise ConfigError(f"{where}: {name} is no text: {error.reason}") from error
    return value
