"""registry.toml, the catalogue of plugins, and the user's own file over it.

The catalogue says what a plugin provides without importing it. So a config that names one plugin imports one plugin,
and a name that is not installed can be answered with the `pip install` that would bring it.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ovforge.contracts.extensions import is_extension_name
from ovforge.contracts.hookspecs import HOOK_OF_KIND
from ovforge.errors import ConfigError, did_you_mean
from ovforge.store.documents import parse_toml

__all__ = ["PluginRecord", "Registry", "set_enabled", "user_registry_path"]

_KEYS = {"distribution", "entry_point", "summary", "provides", "needs", "sections", "enabled"}


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin of the catalogue.

    `provides` maps a kind ("loader", "transform", ...) to {extension name: summary}; `needs` lists the
    distributions that only parts of the plugin need, as pip requirements; `sections` names the tables of a config
    that its driver reads.
    """

    name: str
    distribution: str
    entry_point: str
    summary: str
    provides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    enabled: bool = True

    @property
    def install(self) -> str:
        """The command that brings the plugin."""
        return f"pip install {self.distribution}"


@dataclass(frozen=True)
class Registry:
    """Plugin name -> record, and who is switched off."""

    records: Mapping[str, PluginRecord]
    disabled: frozenset[str] = frozenset()

    @classmethod
    def load(cls, user_file: Path | None = None) -> Registry:
        """Read the packaged catalogue and the user's file (default: `user_registry_path()`) over it.

        Raises ConfigError if the user's file cannot be read, is not TOML, or holds something else than a catalogue.
        """
        path = user_file or user_registry_path()
        records = _merged(cls.packaged().records, _parse(path), path)
        disabled = frozenset(name for name, record in records.items() if not record.enabled)
        return cls(records, disabled)

    @classmethod
    def packaged(cls) -> Registry:
        """Read the packaged catalogue alone."""
        path = _packaged_path()
        return cls(_merged({}, _parse(path), path))

    def providers(self, kind: str, name: str) -> list[PluginRecord]:
        """Return the records that say they provide extension `name` of `kind`."""
        return [record for record in self.records.values() if name in record.provides.get(kind, {})]

    def section_owner(self, name: str) -> PluginRecord | None:
        """Return the record of the plugin that reads a config's section; None if it is not known."""
        return next((record for record in self.records.values() if name in record.sections), None)

    def names(self, kind: str) -> set[str]:
        """Return every extension name of `kind` in the catalogue."""
        return {name for record in self.records.values() for name in record.provides.get(kind, {})}


def user_registry_path() -> Path:
    """Return where the user's own catalogue is: $OVFORGE_REGISTRY, or registry.toml in the config folder."""
    import os

    from platformdirs import user_config_path

    named = os.environ.get("OVFORGE_REGISTRY")
    if not named:
        return user_config_path("ovforge", appauthor=False) / "registry.toml"
    try:
        return Path(named).expanduser()
    except RuntimeError:  # the home of a user who does not exist: a name like any other
        return Path(named)


def set_enabled(name: str, enabled: bool, path: Path | None = None) -> Path:
    """Switch plugin `name` on or off in the user's file; everything else in it, comments included, stays as it is.

    Raises ConfigError if the file that is there is not a catalogue, or cannot be changed so: it is then left alone.
    """
    from ovforge.store.files import atomic_write

    path = path or user_registry_path()
    wanted = _parse(path)
    _merged(Registry.packaged().records, wanted, path)
    wanted.setdefault("plugin", {}).setdefault(name, {})["enabled"] = enabled
    for edit in (_edited, _appended):
        text = edit(_read_text(path), name, enabled)
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(text) == wanted:
                # A link stays a link: the file that it leads to is written.
                atomic_write(path.resolve(), text.encode())
                return path
    raise ConfigError(
        "the file is written in a way that ovforge cannot change without losing something",
        where=str(path),
        hint=f"Write it yourself: under [plugin.{name}], enabled = {str(enabled).lower()}.",
    )


def _edited(text: str, name: str, enabled: bool) -> str:
    """Return a catalogue's text with a plugin's own table changed; the text itself if it has none, or an odd one."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document: Any = tomlkit.parse(text)
        document["plugin"][name]["enabled"] = enabled
        return tomlkit.dumps(document)
    except (TOMLKitError, KeyError, TypeError):
        return text


def _appended(text: str, name: str, enabled: bool) -> str:
    """Return a catalogue's text with a table for a plugin after it."""
    line = "\r\n" if "\r\n" in text else "\n"
    gap = line * ((bool(text) and not text.endswith("\n")) + bool(text.strip()))
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    return f"{text}{gap}[plugin.{key}]{line}enabled = {str(enabled).lower()}{line}"


def _packaged_path() -> Path:
    """The wheel holds registry.toml at the top of the package; a checkout has it at its own top."""
    package = Path(__file__).parents[1]
    packaged = package / "registry.toml"
    return packaged if packaged.is_file() else package.parents[1] / "registry.toml"


def _read_text(path: Path) -> str:
    """Return a file's text with its own line ends, without a byte order mark; "" if there is no such file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"it is not UTF-8 text: {error.reason} at byte {error.start}",
            where=str(path),
            hint="Save the file as UTF-8, or move it away.",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"it cannot be read: {reason}",
            where=str(path),
            hint="Make it readable, move it away, or name another file by OVFORGE_REGISTRY.",
        ) from error


def _parse(path: Path) -> dict[str, Any]:
    return parse_toml(_read_text(path), str(path), error=ConfigError)


def _merged(records: Mapping[str, PluginRecord], document: Mapping[str, Any], path: Path) -> dict[str, PluginRecord]:
    """Return `records` with the tables of a catalogue added; a table of a known name changes that record."""
    merged = dict(records)
    if unknown := sorted(set(document) - {"plugin"}):
        raise ConfigError(f"unknown key {unknown[0]!r}", where=str(path), hint="The file holds [plugin.NAME] tables.")
    tables = document.get("plugin", {})
    if not isinstance(tables, dict):
        raise ConfigError("`plugin` must be a table", where=str(path), hint="The file holds [plugin.NAME] tables.")
    for name, table in tables.items():
        where = f"{path}: plugin.{name}"
        _check(table, where)
        known = merged.get(name)
        if known is None and "entry_point" not in table:
            if set(table) == {"enabled"}:
                known = PluginRecord(name, name, name, "")
            else:
                raise ConfigError(
                    "a new plugin needs `entry_point`", where=where, hint='Add entry_point = "package.module".'
                )
        base = known or PluginRecord(name, name, table["entry_point"], "")
        changes = {key: value for key, value in table.items() if key not in ("needs", "provides", "sections")}
        for key in ("needs", "sections"):
            if key in table:
                changes[key] = tuple(table[key])
        if "provides" in table:
            changes["provides"] = table["provides"]
        merged[name] = replace(base, **changes)
    return merged


def _check(table: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError("it must be a table", where=where, hint="Write [plugin.NAME] and keys below it.")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(
                f"unknown key {key!r}.{did_you_mean(key, _KEYS)}",
                where=where,
                hint=f"Known keys: {', '.join(sorted(_KEYS))}.",
            )
    for key, kind, name in (
        ("distribution", str, "text"),
        ("entry_point", str, "text"),
        ("summary", str, "one line of text"),
        ("enabled", bool, "true or false"),
    ):
        if key in table and (not isinstance(table[key], kind) or (kind is str and not _is_line(table[key]))):
            raise ConfigError(f"`{key}` must be {name}", where=where, hint=f"It is {table[key]!r}.")
    for key, items in (("needs", "pip requirements"), ("sections", "names of config tables")):
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"`{key}` must be a list of {items}", where=where)
    provides = table.get("provides", {})
    if not isinstance(provides, dict):
        raise ConfigError(
            "`provides` must be a table", where=where, hint="As in provides.loader = { name = 'summary' }."
        )
    for kind_name, names in provides.items():
        if kind_name not in HOOK_OF_KIND:
            raise ConfigError(
                f"unknown kind {kind_name!r} in `provides`.{did_you_mean(kind_name, HOOK_OF_KIND)}",
                where=where,
                hint=f"Kinds: {', '.join(HOOK_OF_KIND)}.",
            )
        if not isinstance(names, dict) or not all(map(_is_line, names.values())):
            raise ConfigError(
                f"`provides.{kind_name}` must map names to one-line summaries", where=where, hint="{ name = 'summary' }"
            )
        for name in names:
            if not is_extension_name(name):
                raise ConfigError(
                    f"{name!r} in `provides.{kind_name}` is not a valid extension name",
                    where=where,
                    hint="Names are lower-case words joined by hyphens.",
                )


def _is_line(value: Any) -> bool:
    """Say whether `value` is one line of text without control characters, which could steer a terminal."""
    return isinstance(value, str) and value.isprintable()
