"""registry.toml, the catalogue of plugins, and the user's own file over it.

The catalogue says what a plugin provides without importing it. So a config that names one plugin imports one plugin,
and a name that is not installed can be answered with the `pip install` that would bring it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
        """Read the packaged catalogue and the user's file (default: `user_registry_path()`) over it."""
        records = _read(_packaged_path(), {})
        path = user_file or user_registry_path()
        if path.is_file():
            records = _read(path, records)
        disabled = frozenset(name for name, record in records.items() if not record.enabled)
        return cls(records, disabled)

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
    return Path(named) if named else user_config_path("ovforge", appauthor=False) / "registry.toml"


def set_enabled(name: str, enabled: bool, path: Path | None = None) -> Path:
    """Switch plugin `name` on or off in the user's file; every other line of the file's tables stays."""
    import tomli_w

    from ovforge.store.files import atomic_write

    path = path or user_registry_path()
    document = _parse(path) if path.is_file() else {}
    document.setdefault("plugin", {}).setdefault(name, {})["enabled"] = enabled
    atomic_write(path, tomli_w.dumps(document).encode())
    return path


def _packaged_path() -> Path:
    """The wheel holds registry.toml at the top of the package; a checkout has it at its own top."""
    package = Path(__file__).parents[1]
    packaged = package / "registry.toml"
    return packaged if packaged.is_file() else package.parents[1] / "registry.toml"


def _parse(path: Path) -> dict[str, Any]:
    return parse_toml(path.read_bytes(), str(path), error=ConfigError)


def _read(path: Path, records: Mapping[str, PluginRecord]) -> dict[str, PluginRecord]:
    """Return `records` with the tables of `path` added; a table of a known name changes that record."""
    document = _parse(path)
    merged = dict(records)
    if unknown := sorted(set(document) - {"plugin"}):
        raise ConfigError(f"unknown key {unknown[0]!r}", where=str(path), hint="The file holds [plugin.NAME] tables.")
    for name, table in document.get("plugin", {}).items():
        where = f"{path}: plugin.{name}"
        _check(table, where)
        known = merged.get(name)
        if known is None and "entry_point" not in table:
            if set(table) == {"enabled"}:
                known = PluginRecord(name, name, name, "not in the catalogue")
            else:
                raise ConfigError("a new plugin needs `entry_point`", where=where)
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
        raise ConfigError("expected a table", where=where)
    for key in table:
        if key not in _KEYS:
            raise ConfigError(
                f"unknown key {key!r}.{did_you_mean(key, _KEYS)}",
                where=where,
                hint=f"Known keys: {', '.join(sorted(_KEYS))}.",
            )
    for key, kind in (("distribution", str), ("entry_point", str), ("summary", str), ("enabled", bool)):
        if key in table and not isinstance(table[key], kind):
            raise ConfigError(f"`{key}` must be a {kind.__name__}", where=where)
    for key, items in (("needs", "pip requirements"), ("sections", "names of config tables")):
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"`{key}` must be a list of {items}", where=where)
    provides = table.get("provides", {})
    if not isinstance(provides, dict):
        raise ConfigError("`provides` must be a table", where=where)
    for kind_name, names in provides.items():
        if kind_name not in HOOK_OF_KIND:
            raise ConfigError(
                f"unknown kind {kind_name!r} in `provides`.{did_you_mean(kind_name, HOOK_OF_KIND)}",
                where=where,
                hint=f"Kinds: {', '.join(HOOK_OF_KIND)}.",
            )
        if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
            raise ConfigError(f"`provides.{kind_name}` must map names to one-line summaries", where=where)
