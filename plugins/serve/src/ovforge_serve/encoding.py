"""JSON that holds files."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

__all__ = ["as_json"]


def as_json(value: Any) -> bytes:
    """Return a value as JSON in ASCII, with bytes in it as base64.

    Base64 needs no quoting, so it is put between the quotes afterwards: a writer of JSON would look at each letter of a
    picture, and hold up all other requests meanwhile.
    """
    files: list[bytes] = []
    mark = os.urandom(16).hex()  # what a client sent cannot hold it

    def place(part: object) -> str:
        if not isinstance(part, bytes):
            raise TypeError(f"{type(part).__name__} has no form in JSON")
        files.append(part)
        return mark

    first, *rest = json.dumps(value, default=place).encode().split(mark.encode())
    pieces = [first]
    for data, text in zip(files, rest, strict=True):
        pieces += [base64.b64encode(data), text]
    return b"".join(pieces)
