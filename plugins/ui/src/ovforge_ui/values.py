"""What a form holds, as a task's inputs; and what a task's inputs are, as a form shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ovforge.errors import InputError, PluginError
from ovforge.model import values_as_json
from ovforge.store import parse_json
from ovforge_ui.fields import Field

__all__ = ["inputs_of", "shown"]

_WHOLE = re.compile(r"[-+]?\d{1,40}", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,2})?", re.ASCII | re.IGNORECASE)


def inputs_of(fields: Sequence[Field], values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call is given. What stands as it was at the beginning is left out, if a call need not say it.

    `given` is what the config says. Raises InputError for text that should be JSON and is not, and for a file that is
    missing.
    """
    found = {}
    for field in fields:
        value = _value(field, values.get(field.name))
        if field.name in given:
            if value is None and (field.parts or (not field.nullable and field.kind != "text")):
                continue  # an empty number, or objects that nobody filled in, stand for what the config says
        elif value is None:
            if field.required:
                raise InputError("is missing", where=field.title, hint=field.help or None)
            continue
        elif not field.required and value in (field.default, _as_json(field)):
            continue
        found[field.name] = value
    return found


def shown(field: Field, value: Any) -> Any:
    """Return a value as the form shows it."""
    if value is None:
        return "" if field.kind in ("text", "lines", "json") else None
    if field.kind == "text":
        return value[0] if isinstance(value, list) and value else str(value)
    if field.kind == "lines":
        return "\n".join(map(str, value if isinstance(value, list | tuple) else [value]))
    if field.kind == "json":
        return json.dumps(_as_json(replace(field, default=value)), ensure_ascii=False)
    if field.kind in ("integer", "number"):
        value = value[0] if isinstance(value, list | tuple) and value else value
        return value if isinstance(value, int | float) else None
    return value


def _as_json(field: Field) -> Any:
    """Return the default as JSON has it; None for one that has no such form, which the form then leaves empty."""
    try:
        return values_as_json(field.default, field.name)
    except PluginError:
        return None


def _number(value: Any, field: Field) -> int | float | None:
    """Return the number of a slider or a text; None for an empty one. Raises InputError for what is not a number."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None
        if not _NUMBER.fullmatch(text):
            raise InputError(f"{text[:40]!r} is not a number", where=field.title, hint="Write it as 12 or 0.5.")
        value = int(text) if _WHOLE.fullmatch(text) else float(text)
    return int(value) if field.kind == "integer" and isinstance(value, float) and value.is_integer() else value


def _value(field: Field, value: Any) -> Any:
    """Return what the form holds as the task takes it; None if nothing is filled in."""
    if isinstance(value, Exception):
        raise value
    if field.kind == "text":
        # An empty text is one where the task needs some, and nothing where it does without.
        return value or ("" if not field.nullable else None)
    if field.kind == "lines":
        return [line for line in (value or "").splitlines() if line.strip()]
    if field.kind == "json":
        return parse_json(value, field.title, error=InputError) if (value or "").strip() else None
    if field.kind in ("integer", "number"):
        return _number(value, field)
    if field.parts:
        objects = [each for number, one in enumerate(value or (), 1) if (each := _object(field, one, number))]
        return (objects if field.kind == "objects" else objects[0]) if objects else None
    if field.is_file:
        return value or None
    return value


def _object(field: Field, values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return one object of a field; {} for one that nobody filled in."""
    if not inputs_of([replace(part, required=False) for part in field.parts], values, {}):
        return {}
    try:
        return inputs_of(field.parts, values, {})
    except InputError as error:
        where = f"{field.title} {number}: {error.where}" if field.most > 1 else f"{field.title}: {error.where}"
        raise InputError(error.what, where=where, hint=error.hint) from error
