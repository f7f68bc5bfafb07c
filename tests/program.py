"""The program in the tests' own process, which has imported what it needs: seconds less than a process for each call."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovforge.cli import main


@dataclass(frozen=True)
class Ended:
    """What a call printed, and the code that it ended with."""

    code: int
    stdout: str
    stderr: str


def ovforge(*arguments: object, cwd: Path | None = None) -> Ended:
    """Run `ovforge` with arguments, by default in the current folder. What would be a traceback is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd or Path.cwd()), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):  # fmt: skip
        patch.setattr("sys.argv", ["ovforge", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())
