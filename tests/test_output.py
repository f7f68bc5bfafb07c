"""What the program prints: text from elsewhere stays text, whatever it holds."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovforge.cli import (
    check_folder,
    check_writable,
    plain,
    print_block,
    print_error,
    print_json,
    print_line,
    print_note,
    print_result,
    print_table,
    print_warning,
    progress_bar,
    status_line,
)
from ovforge.contracts import Progress
from ovforge.errors import InputError, OvforgeError
from ovforge.model import ImagesResult, Result

ROOT = Path(__file__).parents[1]
STYLE = re.compile(r"\x1b\[[0-9;]*m")
PIECES = st.sampled_from(
    ["\x1b[31m", "\x1b]0;t\x07", "\x1b", "\x9b2J", "[red]", "[/x]", "[/]", "[link=x]", ":smile:", "\u202e", "\u2066", "\u2028",
     "\x00", "\x7f", "\r", "\n", "\t", "\ud800", "\U000e0041", "\\", "a", " ", "猫", "é", "👩\u200d🚀"]
)  # fmt: skip
FOREIGN = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=8))


def printed(write: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    """Return what comes out on both streams; a `terminal` gets colours."""

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        write()
    return stream.getvalue()


def safe(text: str) -> bool:
    return all(
        unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\n\t\u200d\u200c"
        for letter in text
    )


@given(FOREIGN)
def test_plain_text_is_safe_and_legible(text: str) -> None:
    assert safe(plain(text)) and "\n" not in plain(text) and "\t" not in plain(text)
    assert safe(plain(text, lines=True)) and plain(text, lines=True).count("\n") == text.count("\n")
    assert plain(plain(text)) == plain(text)
    if safe(text) and not set(text) & set("\n\t"):
        assert plain(text) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_but_our_own_styles_reaches_the_terminal(terminal: bool) -> None:
    monkeypatch = pytest.MonkeyPatch()

    @given(FOREIGN)
    def check(text: str) -> None:
        error = OvforgeError(text, where=text, hint=text)
        for write in (
            lambda: print_line(text, (text, "bold")),
            lambda: print_note(text),
            lambda: print_warning(text),
            lambda: print_error(error),
            lambda: print_block(text),
        ):
            out = STYLE.sub("", printed(write, monkeypatch, terminal))
            assert safe(out)
            if "\t" not in text:  # which rich shows as blanks, where it is kept
                assert plain(text) in out.replace("\n  ", "\\n").replace("\n", "\\n")
        assert safe(
            STYLE.sub("", printed(lambda: print_table([text], [[(text, "red")]], fold=[text]), monkeypatch, terminal))
        )
        shown = printed(lambda: print_json({text: text}), monkeypatch, terminal)
        assert shown.isascii() and json.loads(shown) == {text: text}

    check()


def test_progress_cannot_be_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with progress_bar(False) as show:
            show(Progress("[/x]\x1b[31m", 1, 2, "\x1b]0;title\x07[/y]"))
        with status_line() as tell:
            tell("\x1b]0;title\x07[/z]")

    assert printed(write, monkeypatch, False) == "[/x]\\x1b[31m... \\x1b]0;title\\x07[/y]\n"
    out = printed(write, monkeypatch, True)
    assert "[/x]\\x1b[31m" in out and "[/z]" in out and "\x1b]" not in out and "\x07" not in out
    assert printed(lambda: progress_bar(True).__enter__()(Progress("x", 1, 2)), monkeypatch, True) == ""


def test_nothing_else_prints() -> None:
    """One way: no other module of the program and of plugins prints, or imports rich."""
    files = [*(ROOT / "core/ovforge").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]
    found = [
        str(file.relative_to(ROOT))
        for file in files
        if file.name not in ("output.py", "hookspecs.py")  # whose examples stand in docstrings
        and "templates" not in file.parts
        and re.search(r"^\s*(print\(|from rich|import rich)|typer\.echo|sys\.std(out|err)\.write", file.read_text(), re.MULTILINE)
    ]  # fmt: skip
    assert not found


def test_warnings_reach_standard_error_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(Result(warnings=["the prompt [b] was cut"]), [], None, quiet=True)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "warning: the prompt [b] was cut\n")


def test_what_cannot_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "x.png", ImagesResult)
    for path, message in (
        (tmp_path / "x.doc", r"cannot write \.doc"),
        (tmp_path / "x", "cannot write a file without an ending"),
        (tmp_path / "none" / "x.png", "no such folder"),
        (Path("/proc/x.png"), "nothing can be written there"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path, ImagesResult)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path / "a.png", ImagesResult)
    check_folder(tmp_path / "new" / "newer")
    with pytest.raises(InputError, match="nothing can be written there"):
        check_folder(Path("/proc/new"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "nothing is left behind"


def test_a_terminal_without_unicode_and_an_interruption() -> None:
    code = (
        "import ovforge.cli.pipelines as commands; from ovforge.cli import main, print_line\n"
        "def show() -> None:\n    print_line('猫 ok')\n"
        "def stop() -> None:\n    raise KeyboardInterrupt\n"
        "commands.schema, commands.plan = show, stop\n"
        "main()"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    for command, status, out, error in (("schema", 0, "\\u732b ok\n", ""), ("plan", 130, "", "interrupted\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, command], capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, out, error)
