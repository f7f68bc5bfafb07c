"""The items of a batch: JSON lines, each the task's inputs, with an `id` if it is not the line's number."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovforge.errors import InputError
from ovforge.store import parse_object

__all__ = ["Item", "count_items", "read_items", "seed_of"]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NUMBERED = re.compile(r"(.+)-\d+")
_LONGEST = 16 * 2**20
"""Bytes of a line."""


@dataclass(frozen=True)
class Item:
    """One line: its id, number (from 1), digest, and inputs; or what is wrong with it."""

    id: str
    line: int
    digest: str
    inputs: dict[str, Any]
    problem: str | None = None


def read_items(path: Path) -> Iterator[Item]:
    """Yield the items of a file, one in memory at a time; empty lines are none."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                raise InputError(f"the line has more than {_LONGEST} bytes", where=f"{path}: line {number}")
            if line.strip():
                yield _item(line.strip(), number)


def count_items(path: Path) -> int:
    """Return how many items there are. Raises InputError if two would be written to one file, or if there is none."""
    seen: dict[str, int] = {}
    try:
        for item in read_items(path):
            if item.id in seen:
                raise InputError(
                    f"the lines {seen[item.id]} and {item.line} have the same id, {item.id!r}", where=str(path),
                    hint="Ids tell the results apart: change one.",
                )  # fmt: skip
            seen[item.id] = item.line
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    for name in seen:
        if (match := _NUMBERED.fullmatch(name)) and match[1] in seen:
            raise InputError(
                f"{name!r} may also be a file of {match[1]!r}, if that gives several",
                where=f"{path}: line {seen[name]}",
                hint="Change one of the two ids.",
            )
    return len(seen)


def seed_of(batch: int, item: str) -> int:
    """Return an item's seed (31 bits), whoever runs it and whenever."""
    return int.from_bytes(hashlib.sha256(f"{batch}:{item}".encode()).digest()[:4], "big") >> 1


def _item(line: bytes, number: int) -> Item:
    name, digest = f"{number:06}", hashlib.sha256(line).hexdigest()
    try:
        inputs = parse_object(line, f"line {number}", size=_LONGEST, error=InputError)
    except InputError as error:
        return Item(name, number, digest, {}, error.what)
    given = inputs.pop("id", name)
    if not isinstance(given, str | int) or not _ID.fullmatch(str(given)):
        problem = f"its id, {json.dumps(given)[:100]}, is not a valid name of a file"
        return Item(name, number, digest, {}, problem)
    return Item(str(given), number, digest, inputs)
