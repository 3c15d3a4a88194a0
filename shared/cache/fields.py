"""JSON objects of unknown origin, read field by field: each value has the kind and the bounds that are asked for.

JSON as such lets a number be true, NaN or have a thousand digits, and a text hold anything. What stands in a manifest or
a receipt is counted with, put into messages and used as names, so nothing is taken from one but through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shared.cache import files
from shared.errors import shown

MAX_COUNT = (1 << 53) - 1  # of anything; what every JSON reader holds exactly
HEX_32 = re.compile(r"[0-9a-f]{32}")
HEX_64 = re.compile(r"[0-9a-f]{64}")
WORD = re.compile(r"[A-Za-z0-9_]{1,80}")
LINE = re.compile(r"[ -~]{0,200}")  # printable ASCII


class Fields:
    """One JSON object; `where` names the file, `name` the object in it, for messages.

    All methods raise `DamagedError`: the field is missing, or not what was asked for.
    """

    def __init__(self, data: object, where: str, remedy: str, name: str = "") -> None:
        self._where, self._remedy, self._name = where, remedy, name
        if not isinstance(data, dict):
            raise self._error(name, "an object", data)
        self._data: Mapping[str, Any] = data

    def value(self, name: str) -> Any:
        """The field as it is."""
        if name not in self._data:
            raise files.DamagedError(self._where, f"has no field {self._full(name)}", self._remedy)
        return self._data[name]

    def integer(self, name: str, least: int = 0, most: int = MAX_COUNT) -> int:
        """A whole number."""
        return self._integer(name, self.value(name), least, most)

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        """Text that matches as a whole."""
        return self._text(name, self.value(name), pattern)

    def integers(self, name: str, count: int, most: int = MAX_COUNT) -> tuple[int, ...]:
        """A list of `count` whole numbers from 0 on."""
        return tuple(self._integer(name, v, 0, most) for v in self._list(name, count, count))

    def texts(self, name: str, pattern: re.Pattern[str], most: int) -> tuple[str, ...]:
        """A list of at most `most` texts."""
        return tuple(self._text(name, v, pattern) for v in self._list(name, 0, most))

    def counts(self, name: str, most: int) -> dict[str, int]:
        """An object of at most `most` whole numbers by name."""
        inner = self.inner(name)
        if len(inner._data) > most:
            raise self._error(name, f"at most {most} entries", len(inner._data))
        return {inner._text(key, key, LINE): inner.integer(key) for key in inner._data}

    def inner(self, name: str) -> Fields:
        """An object inside this one."""
        return Fields(self.value(name), self._where, self._remedy, self._full(name))

    def inners(self, name: str, least: int = 0, most: int = MAX_COUNT) -> list[Fields]:
        """A list of objects."""
        values = self._list(name, least, most)
        return [Fields(v, self._where, self._remedy, f"{self._full(name)}.{i}") for i, v in enumerate(values)]

    def _list(self, name: str, least: int, most: int) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            size = f"{least}" if least == most else f"{least} to {most}" if most < MAX_COUNT else f"{least} or more"
            raise self._error(name, f"a list of {size} values", value)
        return value

    def _integer(self, name: str, value: object, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:  # true is no number
            raise self._error(name, f"a whole number from {least} to {most}", value)
        return value

    def _text(self, name: str, value: object, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._error(name, f"text like {pattern.pattern}", value)
        return value

    def _full(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name

    def _error(self, name: str, expected: str, found: object) -> files.DamagedError:
        what = shown(self._full(name) or "the file")
        return files.DamagedError(self._where, f"{what}: expected {expected}, found {shown(found)}", self._remedy)
