"""Child processes: started in one way, so that no file in the current folder is run instead of the program's own.

Python puts the current folder before its own modules (`python -m`, `-c`), and a relative or empty entry of PATH or
PYTHONPATH means the current folder too. A model folder from elsewhere may be the current folder.

A child that runs this interpreter ends with its parent, however that ends: it reads a pipe of which the parent holds
the other end, which the system closes with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovforge.errors import ConfigError

__all__ = ["clean_environment", "end_with_parent", "run_program", "run_python"]

_KEPT = {"PYTHONNOUSERSITE", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONFAULTHANDLER"}
"""Variables of Python's that choose no code."""

_PARENT = "OVFORGE_PARENT"
"""Variable that tells a child the number of the pipe that ends with its parent."""


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what lets a child process run code from the current folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name in _KEPT}
    kept.pop(_PARENT, None)
    for name in ("PATH", "PYTHONPATH"):
        if folders := _absolute(os.environ.get(name, "")):
            kept[name] = folders
        else:
            kept.pop(name, None)
    return {**kept, "PYTHONSAFEPATH": "1"}


def run_python(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run this interpreter with `arguments` (such as ["-m", "package.module"]) and wait for it.

    `environment` is added to the clean one; `options` are those of subprocess.run. A program that calls
    `end_with_parent` ends when this process does; not on Windows, which hands no pipes on.
    """
    command = [str(Path(sys.executable).absolute()), "-P", *arguments]
    variables = {**clean_environment(), **(environment or {})}
    if os.name != "posix":
        return subprocess.run(command, env=variables, check=False, **options)
    reads, writes = os.pipe()  # which nobody else inherits
    try:
        variables[_PARENT] = str(reads)
        return subprocess.run(command, env=variables, check=False, pass_fds=[reads], **options)
    finally:
        os.close(writes)
        os.close(reads)


def end_with_parent() -> None:
    """End this process, at once, when the one that started it by `run_python` is gone; does nothing in others.

    What a killed process leaves behind is removed by the next one, as ever.
    """
    if (pipe := os.environ.pop(_PARENT, None)) is not None:
        threading.Thread(target=_end_after, args=[int(pipe)], name="ovforge-parent", daemon=True).start()


def _end_after(pipe: int) -> None:
    os.read(pipe, 1)  # nobody writes: it returns at the pipe's end
    os._exit(1)


def run_program(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a program of the system and wait for it. Its bare name is looked for in the absolute folders of PATH.

    Raises ConfigError if there is no such program. `options` are those of subprocess.run.
    """
    environment = clean_environment()
    found = shutil.which(command[0], path=environment.get("PATH", os.defpath)) if command else None
    if found is None:
        raise ConfigError(
            f"there is no program {command[0]!r}" if command else "names no program",
            where="command",
            hint="Give its absolute path, or install it into a folder of PATH.",
        )
    return subprocess.run([found, *command[1:]], env=environment, check=False, **options)


def _absolute(folders: str) -> str:
    return os.pathsep.join(folder for folder in folders.split(os.pathsep) if Path(folder).is_absolute())
