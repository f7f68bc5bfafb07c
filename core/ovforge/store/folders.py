"""Folders that ovforge writes: which files in them are its own, and how one takes the place of an older one.

A hidden file in the folder lists what ovforge wrote there. Replacing the folder replaces those files and no others.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ovforge.errors import InputError, OvforgeError
from ovforge.store.documents import parse_json

__all__ = ["MARKER", "carry_over", "check_apart", "check_replaceable", "mark", "owned_files", "remove_replaced"]

MARKER = ".ovforge-files"
"""Name of the file that lists what ovforge wrote into a folder."""


def mark(folder: Path) -> None:
    """Write down that all files in `folder` are ovforge's."""
    note = "Written by ovforge. With --force it replaces these files, and leaves all others in the folder."
    text = json.dumps({"note": note, "files": _files(folder)}, indent=1)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def owned_files(folder: Path) -> set[str] | None:
    """Return the relative POSIX paths that ovforge wrote into a folder; None if it did not write the folder."""
    try:
        value = parse_json((folder / MARKER).read_bytes(), str(folder / MARKER))
        return {MARKER, *map(str, value["files"])}
    except (OSError, OvforgeError, KeyError, TypeError):  # no list, or a damaged one: nothing is known to be ours
        return None


def check_replaceable(folder: Path, own: Iterable[str] | None = None) -> set[str]:
    """Return the files in `folder` that may be replaced: `own`, or those that its list names.

    Raises InputError if it is a file, or a folder with content that ovforge did not write.
    """
    if not folder.is_dir():
        raise InputError("is a file, and a folder is to be written", where=str(folder), hint="Name another folder.")
    if own is not None:
        return {MARKER, *own}
    owned = owned_files(folder)
    if owned is None and any(folder.iterdir()):
        raise InputError(
            "is a folder that ovforge did not write, so that its files are not replaced",
            where=str(folder),
            hint="Name another folder, or remove this one yourself.",
        )
    return owned or set()


def check_apart(target: Path, *sources: Path) -> None:
    """Refuse to write `target` if it is one of `sources`, contains one, or lies inside one. Raises InputError."""
    ours = target.resolve()
    for source in sources:
        theirs = source.resolve()
        if ours == theirs or _same(ours, theirs):
            what = "is what the model is read from, and would be replaced while it is read"
        elif theirs.is_relative_to(ours):
            what = f"contains {source}, which is read"
        elif theirs.is_dir() and ours.is_relative_to(theirs):
            what = f"lies inside {source}, which is read"
        else:
            continue
        raise InputError(what, where=str(target), hint="Name an output elsewhere.")


def carry_over(old: Path, new: Path, own: set[str]) -> None:
    """Put the files of `old` that are not in `own` into `new`, by a link where the file system has them.

    Raises InputError if ovforge wrote a file of the same name.
    """
    for name in _files(old):
        if name in own:
            continue
        target = new / name
        if os.path.lexists(target):
            raise InputError(
                f"{name} is there, is not ovforge's, and would be replaced",
                where=str(old),
                hint="Move it away, or name another folder.",
            )
        _make_parents(old, new, PurePosixPath(name))
        _copy(old / name, target)


def remove_replaced(old: Path, new: Path, own: set[str] | None = None) -> None:
    """Remove a folder that another took the place of; `own` are the files that ovforge wrote there.

    A file of the user that came while `new` was made is moved there. If it cannot be, the old folder stays under a
    name that can be seen, with a warning.
    """
    own = own if own is not None else owned_files(old)
    for name in _files(old) if own is not None else ():
        target = new / name
        if name in (own or ()) or _is_copy(old / name, target):
            continue
        if os.path.lexists(target) or not new.is_dir():
            kept = new.with_name(f"{new.name}.kept-{os.urandom(4).hex()}")
            old.rename(kept)
            warnings.warn(f"{name} changed while {new} was replaced; the old folder is {kept}", stacklevel=2)
            return
        _make_parents(old, new, PurePosixPath(name))
        (old / name).rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _is_copy(file: Path, other: Path) -> bool:
    """Say whether two paths are one file, or have the same content."""
    if _same(file, other):
        return True
    regular = file.is_file() and other.is_file() and not file.is_symlink() and not other.is_symlink()
    return regular and filecmp.cmp(file, other, shallow=False)


def _files(folder: Path) -> list[str]:
    """Return all that is not a folder, links included, and empty folders are left out: relative POSIX paths."""
    return sorted(
        (Path(top) / name).relative_to(folder).as_posix()
        for top, folders, files in os.walk(folder)
        for name in [*files, *(each for each in folders if (Path(top) / each).is_symlink())]
    )


def _make_parents(old: Path, new: Path, name: PurePosixPath) -> None:
    """Make the folders above a file, as open or closed to others as they were."""
    for parent in reversed(name.parents[:-1]):
        if not (new / parent).is_dir():
            (new / parent).mkdir()
            shutil.copystat(old / parent, new / parent)


def _copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(file, target, follow_symlinks=False)


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(one.lstat(), other.lstat())
    return False
