"""The projects that `ovforge plugins new` writes: one for each kind of extension, with options, tests and packaging.

They lie in templates/ as working projects of a plugin "my-plugin", so that they are checked and tested as they are; a
copy gets the name that the user chose.
"""

from __future__ import annotations

import re
from pathlib import Path

from ovforge.errors import InputError, did_you_mean
from ovforge.store import atomic_folder

__all__ = ["TEMPLATES", "write_project"]

TEMPLATES = ("transform", "loader", "quantizer", "scheduler", "device", "task", "tracker", "command")
"""The kinds that there is a project for; the first is the default."""

_FOLDER = Path(__file__).parent / "templates"
_NAME, _PACKAGE = "my-plugin", "ovforge_my_plugin"


def write_project(name: str, parent: Path, kind: str = TEMPLATES[0]) -> Path:
    """Write the project `parent`/ovforge-`name`, whole or not at all; return its folder.

    Raises InputError if `name` is not a valid plugin name, `kind` has no template, or the folder is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise InputError(
            f"{name!r} is not a valid plugin name", where="name",
            hint="Use lower-case words joined by hyphens: swap-channels.",
        )  # fmt: skip
    if kind not in TEMPLATES:
        raise InputError(
            f"{kind!r} is not a known kind.{did_you_mean(kind, TEMPLATES)}",
            where="--kind",
            hint=f"Known: {', '.join(TEMPLATES)}.",
        )
    folder = parent / f"ovforge-{name}"
    try:
        with atomic_folder(folder, marked=False) as temporary:
            for template in (_FOLDER / "common", _FOLDER / kind):
                for file in sorted(template.rglob("*")):
                    if file.is_file() and file.suffix != ".pyc":
                        target = temporary / _filled(file.relative_to(template).as_posix(), name)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_text(_filled(file.read_text(encoding="utf-8"), name), encoding="utf-8")
    except FileExistsError as error:
        raise InputError("it is there already", where=str(folder), hint="Choose another name or folder.") from error
    return folder


def _filled(text: str, name: str) -> str:
    return text.replace(_PACKAGE, f"ovforge_{name.replace('-', '_')}").replace(_NAME, name)
