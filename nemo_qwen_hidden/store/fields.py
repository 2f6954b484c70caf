"""Outside JSON, checked once: strict parsing, and fields taken by name with their type."""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from nemo_qwen_hidden.errors import StoreError


def load_json(text: bytes, file: str) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        StoreError: not UTF-8, not JSON, not an object, nested too deep, a key given twice, or NaN; names ``file``.
    """
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise StoreError(file, f"must hold JSON in UTF-8 ({error})", _start(text)) from error
    if not isinstance(value, dict):
        raise StoreError(file, "must hold a JSON object", _start(text))
    return value


def _start(text: bytes) -> bytes:
    return text if len(text) <= 40 else text[:40] + b"..."


def to_json(value: Mapping[str, Any], depth: int = 4) -> bytes:
    """``value`` as UTF-8 JSON in the order given; objects and lists are broken into lines down to ``depth``.

    Raises:
        TypeError, ValueError: it holds what JSON cannot, NaN among it.
    """
    return (_lines(value, depth, "\n") + "\n").encode()


def _lines(value: object, depth: int, newline: str) -> str:
    inner = newline + " "
    if depth and isinstance(value, dict) and value:
        pairs = (f"{json.dumps(key)}: {_lines(item, depth - 1, inner)}" for key, item in value.items())
        return f"{{{inner}{f',{inner}'.join(pairs)}{newline}}}"
    if depth and isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return f"[{inner}{f',{inner}'.join(_lines(item, depth - 1, inner) for item in value)}{newline}]"
    return json.dumps(value, allow_nan=False)


def _brief(value: object) -> object:
    """``value`` as an error shows it: whole where it is short, never pages of it."""
    if isinstance(value, str):
        return value if len(value) <= 60 else value[:60] + "..."
    return reprlib.repr(value) if isinstance(value, (list, dict)) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """Fields of one JSON object; each is taken once, and ``rest`` holds those that nobody took.

    Args:
        file: the file's name, for errors.
        at: where in the file the object stands, e.g. ``hook_points[3]``; empty for the top.

    Raises (every method that takes):
        StoreError: the field is missing or of the wrong type; names the file and the field.
    """

    def __init__(self, value: object, *, file: str, at: str = "") -> None:
        self._file, self._at = file, at
        if not isinstance(value, Mapping):
            raise StoreError(f"{file}: {at}", "must be an object", _brief(value))
        self._left = dict(value)

    def path(self, name: str) -> str:
        """Field ``name`` as an error calls it, e.g. ``hook_points[3].norm``."""
        return f"{self._at}.{name}" if self._at else name

    def error(self, name: str, rule: str, value: object) -> StoreError:
        """What to raise about field ``name``."""
        return StoreError(f"{self._file}: {self.path(name)}", rule, _brief(value))

    def integer(self, name: str, *, minimum: int = 0) -> int:
        value = self._take(name)
        if type(value) is not int or not minimum <= value < 2**63:
            raise self.error(name, f"must be an integer of at least {minimum}", value)
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer of at least 0, or None where the file says null."""
        if self._left.get(name, 0) is None:
            return self._left.pop(name)  # type: ignore[no-any-return]
        return self.integer(name)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers of at least 0."""
        values = self._take(name)
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
            raise self.error(name, "must be a list of integers of at least 0", values)
        return tuple(values)

    def pairs(self, name: str) -> list[tuple[int, int]]:
        """A list of pairs of integers of at least 0."""
        values = self._take(name)
        whole = isinstance(values, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in values)
        if not whole or not all(type(value) is int and 0 <= value < 2**62 for pair in values for value in pair):
            raise self.error(name, "must be a list of pairs of integers of at least 0", values)
        return [(first, second) for first, second in values]

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._take(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(name, "must be a list of strings", values)
        return tuple(values)

    def number(self, name: str) -> float:
        """A finite number of at least 0."""
        value = self._take(name)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.error(name, "must be a number of at least 0", value)
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false", value)
        return value

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise self.error(name, "must be a string", value)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise self.error(name, f"must be one of {', '.join(allowed)}", value)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self.error(name, "must be an object", value)
        return value

    def nested(self, name: str) -> "Fields":
        """The object ``name``, as fields of its own."""
        return Fields(self._take(name), file=self._file, at=self.path(name))

    def each(self, name: str) -> list["Fields"]:
        """The objects of list ``name``, each as fields of its own."""
        values = self._take(name)
        if not isinstance(values, list):
            raise self.error(name, "must be a list", values)
        at = self.path(name)
        return [Fields(value, file=self._file, at=f"{at}[{index}]") for index, value in enumerate(values)]

    def each_or_null(self, name: str) -> list["Fields | None"]:
        """As ``each``, with None where the list has null."""
        values = self._take(name)
        if not isinstance(values, list):
            raise self.error(name, "must be a list", values)
        at = self.path(name)
        return [
            None if value is None else Fields(value, file=self._file, at=f"{at}[{index}]")
            for index, value in enumerate(values)
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def rest(self) -> dict[str, Any]:
        """Fields that this release does not know, to be kept as they are."""
        return self._left

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise self.error(name, "must be there", "missing")
        return self._left.pop(name)
