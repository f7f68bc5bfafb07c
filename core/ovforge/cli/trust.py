"""Asking before a stranger's config touches files outside its folder, and before an output replaces a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.cli.output import plain, print_note
from ovforge.errors import ConfigError, InputError

__all__ = ["Force", "Trust", "check_output", "check_trust"]

Trust = Annotated[
    bool, typer.Option("--trust", help="Run a stranger's config or picture although it uses files outside its folder.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]


def check_trust(config: Path, overrides: list[str], trust: bool) -> None:
    """Show what a config that is not one's own uses outside its folder, and ask; without a terminal, refuse.

    What the user set on the command line is the user's, and is not asked about.
    """
    from ovforge.config.trust import foreign_effects, is_own
    from ovforge.run.resolution import read_pipeline

    if trust or is_own(config):
        return
    value, base = read_pipeline(config)
    effects = foreign_effects(config, _written(value), base)
    if overrides and effects:
        changed, _ = read_pipeline(config, overrides)
        still = foreign_effects(config, _written(changed), base)
        effects = [effect for effect in effects if effect in still]
    if not effects:
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        print_note(f"{config} is not a config of your own:")
        for effect in effects:
            print_note(f"  it {effect}")
        if typer.confirm("Run it?", err=True):
            return
    listed = "".join(f"\n  it {plain(effect)}" for effect in effects)
    raise ConfigError(
        f"it is not a config of your own, and uses files outside its folder:{listed}",
        where=str(config),
        hint="If that is right, add --trust.",
    )


def check_output(config: Path, target: Path, force: bool) -> None:
    """Refuse to replace a file, unless a config of one's own or --force asks for it. Raises InputError."""
    from ovforge.config.trust import is_own

    if force or is_own(config):
        return
    several = sorted(target.parent.glob(f"{_literal(target.stem)}-[0-9]*{_literal(target.suffix)}"))
    if there := [path for path in (target, *several) if path.exists()]:
        raise InputError("is there already", where=str(there[0]), hint="Name another --output, or add --force.")


def _written(config: Any) -> Mapping[str, Any]:
    """Return a config as it was written, with the key's place, which dumps leave out."""
    value: dict[str, Any] = config.as_dict()
    if config.load.key is not None:
        load = value["load"]
        value["load"] = {**(load if isinstance(load, dict) else {"source": load}), "key": config.load.key}
    return value


def _literal(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
