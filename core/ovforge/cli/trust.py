"""Asking before a stranger's config touches files outside its folder, and before an output replaces a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ovforge.cli.output import print_note
from ovforge.errors import InputError

__all__ = ["Force", "Trust", "check_output", "check_trust"]

Trust = Annotated[
    bool, typer.Option("--trust", help="Run a stranger's config or picture although it uses files outside its folder.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]


def check_trust(config: Path, overrides: Sequence[str], trust: bool) -> None:
    """Show what a config that is not one's own uses outside its folder, and ask; without a terminal, refuse.

    Every command that runs a config or a picture calls this first, and then runs it with `trust=True`. What the user
    set on the command line is the user's, and is not asked about. Raises ConfigError if the answer is no.
    """
    from ovforge.run.trust import effects_of, untrusted

    effects = [] if trust else effects_of(config, overrides)
    if not effects:
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        print_note(f"{config} is not a config of your own:")
        for effect in effects:
            print_note(f"  it {effect}")
        if typer.confirm("Run it?", err=True):
            return
    raise untrusted(config, effects, "If that is right, add --trust.")


def check_output(config: Path, target: Path, force: bool) -> None:
    """Refuse to replace a file, unless a config of one's own or --force asks for it. Raises InputError."""
    from ovforge.config.trust import is_own

    if force or is_own(config):
        return
    several = sorted(target.parent.glob(f"{_literal(target.stem)}-[0-9]*{_literal(target.suffix)}"))
    same = [path for path in several if path.suffix == target.suffix]
    if there := [path for path in (target, *same) if path.exists()]:
        raise InputError("is there already", where=str(there[0]), hint="Name another --output, or add --force.")


def _literal(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
