"""Tables as CSV that a spreadsheet opens without running anything in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["csv_table"]

_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a cell must not begin with (OWASP, "CSV Injection"); the last four are their full-width forms."""


def csv_table(rows: Iterable[Sequence[Any]], delimiter: str = ",") -> str:
    """Return rows as CSV, lines ended by "\\n"; text that a spreadsheet would take for a formula begins with "'".

    Numbers, and text that is one, stay as they are.
    """
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(
        [_cell(value) for value in row] for row in rows
    )
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip(" ").startswith(_FORMULAS) and not _is_number(value):
        value = f"'{value}"
    # A NUL ends a field in some readers, a carriage return alone a row; a lone surrogate has no UTF-8.
    return value.replace("\0", "\\0").replace("\r", "\\r").encode("utf-8", "backslashreplace").decode("utf-8")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text
