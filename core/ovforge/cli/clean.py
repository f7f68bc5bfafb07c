"""ovforge clean: remove what killed processes left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovforge.cli.output import print_line
from ovforge.errors import InputError

__all__ = ["clean", "remove_left"]


def clean(
    folder: Annotated[Path, typer.Argument(help="Where to look, with the folders inside it.")] = Path(),
) -> None:
    """Remove the temporary files of killed runs: in a folder, in the cache, and where the system has its own.

    What a living process holds stays, and so do files that ovforge did not make.

    Example: ovforge clean models
    """
    from ovforge.store.cache import Cache

    if not folder.is_dir():
        raise InputError("is not a folder", where=str(folder), hint="Name a folder that models or pictures went to.")
    removed = remove_left(folder, Cache.default().root)
    if not removed:
        print_line("nothing was left behind")


def remove_left(*folders: Path) -> list[Path]:
    """Remove and print what killed processes left below `folders` and where scratch folders are made."""
    from ovforge.store.temporary import remove_abandoned, scratch_parents

    removed = [path for folder in folders for path in remove_abandoned(folder, recursive=True)]
    removed += [path for folder in scratch_parents() for path in remove_abandoned(folder)]
    for path in removed:
        print_line(f"removed {path}")
    return removed
