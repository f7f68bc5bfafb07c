"""pydantic's errors in plain words: the key as it is written, what is wrong, what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from ovforge.errors import ConfigError, did_you_mean

__all__ = ["explained"]

_KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a table",
    "mapping": "a table",
    "model": "a table",
    "path": "a path",
}
"""What to call a type, by the first word of pydantic's error."""

_LISTS = {"str": "a list of texts", "int": "a list of whole numbers", "float": "a list of numbers"}
_SHORT_FORMS = {"Use": "a name or a table", "Load": "a path or a table"}


def explained(problems: Iterable[Any], model: type[BaseModel], where: str) -> ConfigError:
    """Return what pydantic found in values for `model` as one error.

    Alternatives of one key (`int | list[int]`) are told together, or only the one that got furthest.
    """
    places: dict[tuple[str, ...], list[tuple[Mapping[str, Any], Any]]] = {}
    for problem in problems:
        key, parent = _place(problem["loc"], model)
        places.setdefault(key, []).append((problem, parent))
    deepest = [key for key in places if not any(other[: len(key)] == key != other for other in places)]
    sentences = [_sentence(key, places[key]) for key in deepest]
    return ConfigError("; ".join(dict.fromkeys(what for what, _ in sentences)), where=where, hint=sentences[0][1])


def _place(location: Sequence[str | int], model: Any) -> tuple[tuple[str, ...], Any]:
    """Return the key without the names that pydantic gives to members of unions, and the type that has the key."""
    key: list[str] = []
    parent: Any = None
    current: Any = model
    for part in location:
        members = _members(current)
        if len(members) > 1:
            current = next((member for member in members if _name(member) == part), None)
            continue
        parent = members[0]
        key.append(str(part))
        if isinstance(parent, type) and issubclass(parent, BaseModel):
            info = parent.model_fields.get(str(part))
            current = info.annotation if info else None
        else:
            arguments = get_args(parent) or (None,)
            current = arguments[0] if isinstance(part, int) else arguments[-1]
    return tuple(key), parent


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of a type, without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for part in get_args(annotation) if part is not NoneType for inner in _members(part)]
    return [annotation]


def _name(member: Any) -> str:
    return str(member) if get_args(member) else getattr(member, "__name__", str(member))


def _sentence(key: tuple[str, ...], found: Sequence[tuple[Mapping[str, Any], Any]]) -> tuple[str, str]:
    """Return what is wrong with a key, and a hint."""
    problem, parent = found[0]
    name = ".".join(key)
    fields = list(getattr(parent, "model_fields", {}))
    listing = f"Known keys: {', '.join(fields)}." if fields else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{name}`.{did_you_mean(key[-1], fields)}", listing
    if problem["type"] == "missing":
        if key[-1].isdigit():
            return f"`{'.'.join(key[:-1])}` has too few values", ""
        return f"the key `{name}` is missing", listing
    message = re.sub(r"^(Input|String|Value error,) ?", "", problem["msg"])
    message = re.sub(r"^\w+ (should have at \w+ \d+) item(s?) after validation", r"\1 value\2", message)
    if not name:
        return message, ""
    value = problem.get("input")
    shown = f", not {_as_written(value)}" if isinstance(value, str | int | float | bool) else ""
    kinds = list(dict.fromkeys(kind for each, _ in found if (kind := _kind(each))))
    if len(kinds) == len(found) or (kinds and len(found) > 1):
        hint = ""
        if {"text", "a path"} & set(kinds) and not isinstance(value, str | list | dict | None):
            text = f'{key[-1]}="{_as_written(value)}"'
            hint = f"Text stands in quotes: {text}, and on the command line also in single ones: '{text}'."
        return f"`{name}` should be {' or '.join(kinds)}{shown}", hint
    if problem["type"] == "value_error" and not shown:  # of options that do not go together
        return f"`{name}`: {message}", ""
    return f"`{name}` {message[0].lower()}{message[1:]}{shown}", ""


def _kind(problem: Mapping[str, Any]) -> str | None:
    """Return what pydantic asked for in plain words, if it asked for a type and not for a range."""
    kind, _, rest = problem["type"].partition("_")
    if kind not in _KINDS or not rest.startswith(("type", "parsing", "from_float", "attributes", "sub_type")):
        return None
    if kind == "model":
        return _SHORT_FORMS.get(problem.get("ctx", {}).get("class_name", ""), _KINDS[kind])
    inner = re.fullmatch(r"list\[(\w+)\]", str(problem["loc"][-1])) if kind == "list" else None
    return _LISTS.get(inner[1], _KINDS[kind]) if inner else _KINDS[kind]


def _as_written(value: Any) -> str:
    """Return a value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
