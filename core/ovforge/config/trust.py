"""What a config or a picture from somebody else would touch outside its own folder.

Whoever runs a config does what its author wrote: it reads the files that it names, writes where it says, and a key may
be what a command prints. A config of one's own may do so. Of any other, this is shown before anything is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ovforge.errors import ConfigError
from ovforge.model.results import PICTURE_SUFFIXES
from ovforge.model.sources import PACKAGE
from ovforge.store.documents import SIZE, parse_object

__all__ = ["foreign_effects", "is_own"]

_WRITTEN = {("output",), ("quality", "save")}
_FREE_TEXT = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "text"}
_KEY = ("load", "key")
_DEVICE = ("device", "properties")
_PLACES = ("_DIR", "_FILE", "_PATH")
"""Endings of the properties of OpenVINO that name files or folders, which a device writes if they are not there."""


def is_own(config: Path) -> bool:
    """Say whether a config is the user's own: a .toml or .json of theirs, in the current folder or below it.

    A picture never is, whoever made it: what it says was not written to be read before it is run.
    """
    try:
        owner = config.stat().st_uid
        inside = config.resolve().is_relative_to(Path.cwd().resolve())
    except (OSError, ValueError):
        return False
    ours = not hasattr(os, "geteuid") or owner == os.geteuid()
    return config.suffix.lower() in (".toml", ".json") and inside and ours


def foreign_effects(config: Path, value: Mapping[str, Any], base: Path) -> list[str]:
    """Return, in words, what running `value` would read, write or run outside the folder of `config`.

    `base` is the folder that relative paths start at; outputs start at the current one.
    """
    home = config.resolve().parent
    found: dict[str, None] = {}
    for place, text in _texts(value, ()):
        key = ".".join(place)
        if place[:2] == _KEY:
            how = {"command": "runs", "file": "reads", "fd": "reads", "keyring": "asks for"}.get(place[2:3][0], "takes")
            found[f"{how} {text!r} for a key ({key})"] = None
        elif place in _WRITTEN or (place[:2] == _DEVICE and key.upper().endswith(_PLACES)):
            start = base if place[0] == "quality" else Path.cwd()
            if (path := _path(text, start)) is not None and not _inside(path, home, Path.cwd()):
                found[f"writes {path} ({key})"] = None
        elif place[-1] not in _FREE_TEXT and not text.startswith(PACKAGE):
            for path in _read(_path(text, base), home):
                found[f"reads {path} ({key})"] = None
    return list(found)


def _read(path: Path | None, home: Path) -> Iterator[Path]:
    """Yield what is read outside `home` with a path that a config names: itself, or what it leads to.

    A list of inputs (.jsonl) names further files, and pictures in a folder may be links.
    """
    if path is None or not os.path.lexists(path):
        return
    if not _inside(path, home):
        yield path
    elif path.is_dir():
        pictures = (each for each in sorted(path.iterdir()) if each.suffix.lower() in PICTURE_SUFFIXES)
        yield from (each.resolve() for each in pictures if each.is_symlink() and not _inside(each.resolve(), home))
    elif path.suffix.lower() == ".jsonl" and path.is_file() and path.stat().st_size <= SIZE:
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            with contextlib.suppress(ConfigError):  # which is said when the file is read
                for place, text in _texts(parse_object(line, str(path), error=ConfigError), ()):
                    named = _path(text, path.parent) if place[-1] not in _FREE_TEXT else None
                    if named is not None and os.path.lexists(named) and not _inside(named, home):
                        yield named


def _texts(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every text and number of a key with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, place)
    elif isinstance(value, str | Path) or (place[:2] == _KEY and value is not None):
        yield place, str(value)


def _path(text: str, base: Path) -> Path | None:
    try:
        path = base / Path(text).expanduser()
        return path.resolve() if len(text) < 4096 else None
    except (OSError, ValueError, RuntimeError):  # a null character, a loop of links, no such user
        return None


def _inside(path: Path, *folders: Path) -> bool:
    return any(path.is_relative_to(folder.resolve()) for folder in folders)
