"""JSON and TOML that others wrote: read within bounds, so that no text ends in anything but a value or an error."""

from __future__ import annotations

import json
import math
import re
import tomllib
from typing import Any

from ovforge.errors import ModelError, OvforgeError

__all__ = ["DEPTH", "SIZE", "parse_json", "parse_object", "parse_toml"]

SIZE = 64 * 2**20
"""Most bytes of a document: vocabularies of a million words are smaller."""

DEPTH = 64
"""Most levels of tables and lists inside each other."""

_HALF = re.compile("[\ud800-\udfff]|\\\\u[dD][89a-fA-F]")
"""What may be half of a character, which nothing can print or store: itself, or an escape that names it."""


def parse_json(
    data: str | bytes, where: str, *, size: int = SIZE, error: type[OvforgeError] = ModelError, finite: bool = True
) -> Any:
    """Return the value of a JSON text.

    Raises `error`, naming `where`, if it is not valid JSON, longer than `size`, nested deeper than DEPTH, holds a
    number that no float can hold or, with `finite`, NaN or Infinity, or a character that is half of one.
    """
    hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _refused} if finite else {}
    return _parsed("JSON", data, where, size, error, lambda text: json.loads(text, **hooks))


def parse_object(
    data: str | bytes, where: str, *, size: int = SIZE, error: type[OvforgeError] = ModelError, finite: bool = True
) -> dict[str, Any]:
    """Return the JSON object in a text. Raises `error` like parse_json, and if it is anything but an object."""
    value = parse_json(data, where, size=size, error=error, finite=finite)
    if not isinstance(value, dict):
        raise error("expected a JSON object", where=where)
    return value


def parse_toml(
    data: str | bytes, where: str, *, size: int = SIZE, error: type[OvforgeError] = ModelError
) -> dict[str, Any]:
    """Return the table of a TOML text. Raises `error` like parse_json."""
    value: dict[str, Any] = _parsed("TOML", data, where, size, error, tomllib.loads)
    return value


def _parsed(kind: str, data: str | bytes, where: str, size: int, error: type[OvforgeError], parse: Any) -> Any:
    if len(data) > size:
        raise error(f"is longer than {size} bytes", where=where)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = parse(text)
        if not _is_shallow(value):
            raise RecursionError
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except RecursionError:
        raise error(f"not valid {kind}: more than {DEPTH} levels inside each other", where=where) from None
    except UnicodeError as problem:
        raise error(f"not valid {kind}: {_unicode_reason(problem)}", where=where) from None
    except ValueError as problem:  # of syntax, and of numbers with thousands of digits
        raise error(f"not valid {kind}: {str(problem).partition('; use')[0]}", where=where) from problem
    return value


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            part
            for outer in level
            if isinstance(outer, dict | list)
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            return True
    return False


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is larger than any number that a computer holds")
    return number


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _unicode_reason(problem: UnicodeError) -> str:
    if isinstance(problem, UnicodeDecodeError):
        return f"byte {problem.start} is not text in UTF-8"
    return "it holds half of a character (a lone surrogate)"
