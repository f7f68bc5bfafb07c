"""Config files, and values that override them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovforge.errors import ConfigError, OvforgeError, require_type
from ovforge.store.documents import parse_object, parse_toml

__all__ = ["apply_overrides", "read_config"]

_LIMIT = 4 * 2**20
"""Most bytes of a config."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file. Raises ConfigError that names the file and, for syntax, the line."""
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ConfigError(
            f"cannot be read: {error}", where=str(path), hint="A config is a .toml or .json file."
        ) from error
    parse = parse_object if path.suffix.lower() == ".json" else parse_toml
    return parse(data, str(path), size=_LIMIT, error=ConfigError)


def apply_overrides(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `config` with each "key.path=value" set; the value is TOML, or else text.

    List items are named by number: `transform.0.scale=0.5`; one past the end appends.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config, default=str))
    require_type(overrides, (list, tuple), where="overrides", hint='Write: overrides=["KEY=VALUE"].')
    for override in overrides:
        require_type(override, str, where="overrides", hint='Write: overrides=["KEY=VALUE"].')
        key, equals, text = override.partition("=")
        if not override.isascii():
            try:
                override.encode()
            except UnicodeEncodeError as error:
                raise ConfigError("it is not text in UTF-8", where=f"--set {ascii(override)[:100]}") from error
        if not equals or not key.strip():
            raise ConfigError(f"{override!r} is not KEY=VALUE", where="--set", hint="Example: --set scheduler.use=lcm")
        where = f"--set {override if len(override) < 100 else override[:100] + '...'}"
        _set(changed, key.strip().split("."), _value(text.strip(), where), where)
    return changed


def _set(target: Any, path: list[str], value: Any, where: str) -> None:
    for position, key in enumerate(path):
        last = position == len(path) - 1
        if isinstance(target, list):
            index = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
            if not 0 <= index <= len(target):
                raise ConfigError(f"{key!r} is not a position in a list of {len(target)}", where=where)
            if index == len(target):
                target.append({})
            place: Any = index
        else:
            place = key
            if place not in target:
                target[place] = [] if not last and path[position + 1].isdigit() else {}
        if last:
            target[place] = value
            return
        if isinstance(target[place], str):  # the short forms: scheduler = "lcm", load = "folder"
            target[place] = {"source" if key == "load" else "use": target[place]}
        if not isinstance(target[place], dict | list):
            raise ConfigError(f"{'.'.join(path[: position + 1])} is a value, not a table", where=where)
        target = target[place]


def _value(text: str, where: str) -> Any:
    """Return the TOML value in a text, or the text itself if it is none. Raises ConfigError for one out of bounds."""
    if "\n" in text or "\r" in text:  # a value is on one line; what follows would be other keys
        return text
    try:
        return parse_toml(f"value = {text}", where, error=_NoTomlError)["value"]
    except _NoTomlError as error:
        if not isinstance(error.__cause__, tomllib.TOMLDecodeError):
            raise ConfigError(error.what, where=where) from error
        return text


class _NoTomlError(OvforgeError):
    """A value is not TOML."""
