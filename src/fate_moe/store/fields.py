"""How is one field of an untrusted JSON object read without trust?

Each reader takes its field out and checks type and range; `done` refuses what is left over. Every
message names the file, the field and the value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fate_moe.errors import FormatError

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_MISSING = object()


class Fields:
    """The fields of one JSON object that have not been read yet."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise FormatError(f"{where}: must be an object, is {type(data).__name__}")
        self._original = data
        self._data = dict(data)
        self._where = where

    def integer(self, name: str, low: int, high: int, *, multiple: int = 1) -> int:
        """Read an integer in [low, high] that is a multiple of `multiple`."""
        value = self._take(name)
        if type(value) is not int or not low <= value <= high or value % multiple:
            also = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise self._wrong(name, value, f"an integer in [{low}, {high}]{also}")
        return value

    def boolean(self, name: str) -> bool:
        """Read true or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, limit: int) -> str:
        """Read text of 1 to `limit` printable characters."""
        value = self._take(name)
        if not isinstance(value, str) or not 1 <= len(value) <= limit or not value.isprintable():
            raise self._wrong(name, value, f"1 to {limit} printable characters")
        return value

    def optional_text(self, name: str, limit: int) -> str | None:
        """Read text or null."""
        if self._data.get(name, _MISSING) is None:
            del self._data[name]
            return None
        return self.text(name, limit)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Read one of `choices`."""
        value = self.text(name, 64)
        if value not in choices:
            raise self._wrong(name, value, f"one of {', '.join(choices)}")
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        """Read text that `pattern` matches in full."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) > 1024 or not pattern.fullmatch(value):
            raise self._wrong(name, value, f"text like {pattern.pattern}")
        return value

    def file_name(self, name: str) -> str:
        """Read a plain file name: no separator, no leading dot, no drive."""
        return self.matching(name, _FILE_NAME)

    def texts(self, name: str, count: int, pattern: re.Pattern[str]) -> tuple[str, ...]:
        """Read a list of exactly `count` texts that `pattern` matches in full."""
        values = self.matching_all(name, pattern)
        if len(values) != count:
            raise self._wrong(name, len(values), f"a list of {count} entries")
        return values

    def matching_all(self, name: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        """Read a list of texts that `pattern` matches in full."""
        values = self._take(name)
        if not isinstance(values, list):
            raise self._wrong(name, values, "a list")
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self._wrong(name, value, f"text like {pattern.pattern}")
        return tuple(values)

    def sizes(self, name: str, first: int) -> tuple[int, ...]:
        """Read a shape of 1 to 4 sizes whose first one is `first`."""
        value = self._take(name)
        if not isinstance(value, list) or not 1 <= len(value) <= 4:
            raise self._wrong(name, value, "a shape")
        if not all(type(v) is int and 0 < v < 1 << 31 for v in value) or value[0] != first:
            raise self._wrong(name, value, f"a shape that starts with {first}")
        return tuple(value)

    def integers(self, name: str, most: int, low: int, high: int) -> tuple[int, ...]:
        """Read a list of at most `most` integers in [low, high]."""
        value = self._take(name)
        if not isinstance(value, list) or len(value) > most:
            raise self._wrong(name, value, f"a list of at most {most} integers")
        if not all(type(v) is int and low <= v <= high for v in value):
            raise self._wrong(name, value, f"integers in [{low}, {high}]")
        return tuple(value)

    def fields(self, name: str) -> Fields:
        """Read an object."""
        return Fields(self._take(name), f"{self._where}: {name}")

    def objects(self, name: str, low: int, high: int) -> list[Fields]:
        """Read a list of `low` to `high` objects."""
        values = self._take(name)
        if not isinstance(values, list) or not low <= len(values) <= high:
            raise self._wrong(name, values, f"a list of {low} to {high} objects")
        return [Fields(value, f"{self._where}: {name}[{i}]") for i, value in enumerate(values)]

    def names(self, limit: int) -> tuple[str, ...]:
        """List the unread field names, at most `limit`."""
        if len(self._data) > limit:
            raise FormatError(f"{self._where}: {len(self._data)} fields, the limit is {limit}")
        return tuple(self._data)

    def rest(self) -> dict[str, object]:
        """Return everything, read or not, as it came: for objects whose meaning lies elsewhere."""
        return dict(self._original)

    def done(self) -> None:
        """Refuse fields that nobody asked for."""
        if self._data:
            raise FormatError(f"{self._where}: unknown field {min(self._data)[:80]!r}")

    def _take(self, name: str) -> object:
        value = self._data.pop(name, _MISSING)
        if value is _MISSING:
            raise FormatError(f"{self._where}: {name} is missing")
        return value

    def _wrong(self, name: str, value: object, need: str) -> FormatError:
        return FormatError(f"{self._where}: {name} is {value!r:.80}, must be {need}")
