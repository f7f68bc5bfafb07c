"""Config files, and values that override them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovforge.errors import ConfigError

__all__ = ["apply_overrides", "read_config"]


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file. Raises ConfigError that names the file and, for syntax, the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read as text: {error}", where=str(path), hint="A config is a .toml or .json file."
        ) from error
    try:
        value = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"not valid {kind}: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError("expected an object", where=str(path))
    return value


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `config` with each "key.path=value" set; the value is TOML, or text where it is not.

    List items are named by number: `transform.0.scale=0.5`; one past the end appends.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override!r} is not KEY=VALUE", where="--set", hint="Example: --set scheduler.use=lcm")
        _set(changed, key.strip().split("."), _value(text.strip()), f"--set {override}")
    return changed


def _set(target: Any, path: list[str], value: Any, where: str) -> None:
    for position, key in enumerate(path):
        last = position == len(path) - 1
        if isinstance(target, list):
            index = int(key) if key.isdigit() else -1
            if not 0 <= index <= len(target):
                raise ConfigError(f"{key!r} is no position in a list of {len(target)}", where=where)
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


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
