"""Engines: other places than this machine in which a command does its work, such as a cluster.

A distribution adds one by an entry point in the group "ovforge.engines": a callable that takes the options, KEY ->
VALUE as text, and returns an object with a method for each command that it can work for. The command says what that
method takes. This is not a hook: an engine is not a part of a pipeline, no config names one, and commands need no
more of it than its name.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer

from ovforge.errors import ConfigError, InputError, PluginError, did_you_mean

__all__ = ["EMBEDDED", "ENGINES", "Engine", "EngineOptions", "find_engine"]

ENGINES = "ovforge.engines"
"""The group of entry points."""

EMBEDDED = "embedded"
"""The name that stands for this machine, and no engine."""

Engine = Annotated[
    str, typer.Option("--engine", help="Where to work: embedded is this machine; plugins bring others, such as ray.")
]
EngineOptions = Annotated[
    list[str] | None, typer.Option("--engine-option", "-e", metavar="KEY=VALUE", help="An option of the engine.")
]


def find_engine(name: str, options: list[str] | None, command: str) -> Any:
    """Return the engine of that name, made with its options; None for the embedded one.

    Raises ConfigError if there is none, if its plugin is switched off, or if it cannot work for `command`; PluginError
    if it cannot be imported.
    """
    values = dict(map(_option, options or []))
    if name == EMBEDDED:
        if values:
            raise ConfigError(
                f"the embedded engine has no option {next(iter(values))!r}", where="--engine-option",
                hint="Add --engine NAME, or leave the option out.",
            )  # fmt: skip
        return None
    found = {entry.name: entry for entry in entry_points(group=ENGINES)}
    if name not in found:
        known = sorted({EMBEDDED, *found})
        raise ConfigError(
            f"there is no engine {name!r}.{did_you_mean(name, known)}", where="--engine",
            hint=f"Installed: {', '.join(known)}. Others come with a plugin: `pip install ovforge-ray` brings ray.",
        )  # fmt: skip
    _check_enabled(found[name])
    try:
        make = found[name].load()
    except (Exception, SystemExit) as error:  # a plugin's import may raise anything
        raise PluginError(f"it cannot be imported: {type(error).__name__}: {error}", where=f"engine {name}") from error
    engine = make(values)
    if not hasattr(engine, command):
        raise ConfigError(f"the engine {name!r} cannot work for `ovforge {command}`", where="--engine")
    return engine


def _check_enabled(entry: EntryPoint) -> None:
    """Raise ConfigError if the user has switched off the plugin of an engine's distribution."""
    from ovforge.plugins.catalogue import Registry

    registry = Registry.load()
    for record in registry.records.values():
        if entry.dist is not None and record.distribution == entry.dist.name and record.name in registry.disabled:
            raise ConfigError(
                f"the plugin {record.name!r} that brings the engine is switched off", where=f"--engine {entry.name}",
                hint=f"Run: ovforge plugins enable {record.name}",
            )  # fmt: skip


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{text!r} is not KEY=VALUE", where="--engine-option")
    return key.strip(), value.strip()
