"""All that the program prints. Text from elsewhere (files, prompts, labels, paths, plugins) cannot steer the terminal.

Commands of plugins print with these functions, too. Nothing else in ovforge writes to the terminal: a prompt may hold
"[red]", a LoRA's title escape sequences, a file's name a line break.
"""

from __future__ import annotations

import json
import sys
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ovforge.contracts.stages import Progress
    from ovforge.errors import OvforgeError

__all__ = [
    "Part",
    "collected_warnings",
    "plain",
    "print_block",
    "print_error",
    "print_json",
    "print_line",
    "print_note",
    "print_table",
    "print_warning",
    "progress_bar",
    "status_line",
]

Part = str | tuple[str, str]
"""A piece of a line: text, or text with a style of ours: "bold", "dim", "red", "green", "yellow"."""

_JOINERS = frozenset("\u200c\u200d")
"""Join letters of Persian and Indian scripts, and the parts of emoji; they move nothing."""

_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's control, format (direction marks, tags), surrogate and separator characters."""

_LEAST_WIDTH = 120
"""Columns below which tables are not squeezed: their last column would become a line of single letters."""


def plain(text: str, *, lines: bool = False) -> str:
    """Return text that a terminal shows as it is: control and direction characters become "\\x1b", "\\u202e"...

    With `lines`, line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    kept = _JOINERS | frozenset("\n\t") if lines else _JOINERS
    return "".join(
        letter if letter in kept or unicodedata.category(letter) not in _STEERING else _escaped(letter)
        for letter in text
    )


def _escaped(letter: str) -> str:
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    number = ord(letter)
    wide = f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    return short.get(letter, wide)


def print_line(*parts: Part) -> None:
    """Print one line on standard output, its parts one after another."""
    _console().print(_text(parts))


def print_note(*parts: Part) -> None:
    """Print one line on standard error: what is not the result itself."""
    _console(error=True).print(_text(parts))


def print_warning(text: str) -> None:
    """Print a warning on standard error."""
    print_note(("warning:", "yellow"), " ", text)


def print_error(error: OvforgeError) -> None:
    """Print an error on standard error: where, what, and what to do next."""
    console = _console(error=True)
    where: list[Part] = [(plain(error.where), "bold"), ": "] if error.where else []
    console.print(_text([("error:", "bold red"), " ", *where, _indented(error.what)], lines=True))
    if error.hint:
        console.print(_text(["  ", _indented(error.hint)], lines=True))


def print_block(text: str, *, error: bool = False) -> None:
    """Print text of several lines as it is, such as Markdown."""
    _console(error=error).print(_text([text], lines=True))


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON, in ASCII, on standard output; without `indent` on one line, at once."""
    print(json.dumps(value, indent=indent), flush=indent is None)


def print_table(
    titles: Sequence[str], rows: Iterable[Sequence[Part]], *, right: Collection[str] = (), fold: Collection[str] = ()
) -> None:
    """Print rows under bold titles; columns in `right` stand to the right, those in `fold` break into several lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(
            _text([title]), justify="right" if title in right else "left", no_wrap=title not in fold, overflow="fold"
        )
    for row in rows:
        table.add_row(*(_text([cell]) for cell in row))
    console = _console(soft_wrap=False)
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(table)


@contextmanager
def progress_bar(silent: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar on standard error while work goes on, if that is a terminal; else a line for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from ovforge.contracts.stages import ignore_progress

    if silent:
        yield ignore_progress
        return
    console = _console(error=True)
    if not console.is_terminal:
        yield _stage_lines()
        return
    columns = (
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # Standard output is the result's: it must not come out on this console.
    with Bar(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        tasks: dict[str, Any] = {}

        def show(moment: Progress) -> None:
            stage = plain(moment.stage)
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=moment.total, note="")
            bar.update(tasks[stage], completed=moment.done, total=moment.total, note=plain(moment.note))

        yield show


def _stage_lines() -> Callable[[Progress], None]:
    stages: set[str] = set()

    def show(moment: Progress) -> None:
        if moment.stage not in stages:
            stages.add(moment.stage)
            print_note(f"{moment.stage}... {moment.note}".rstrip())

    return show


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text instead of the last one, on standard error, if that is a terminal."""
    console = _console(error=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    from rich.live import Live

    with Live(_text([]), console=console, transient=True, redirect_stdout=False) as live:
        yield lambda text: live.update(_text([text]))


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield a list that takes the texts of Python's warnings, which are still shown, while a block runs."""
    collected: list[str] = []
    shown = warnings.showwarning

    def collect(message: Warning | str, *arguments: Any, **options: Any) -> None:
        collected.append(str(message))
        shown(message, *arguments, **options)

    warnings.showwarning = collect
    try:
        yield collected
    finally:
        warnings.showwarning = shown


def prepare_streams() -> None:
    """Let characters that the terminal's encoding does not have be escaped, rather than end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _console(*, error: bool = False, soft_wrap: bool = True) -> Console:
    from rich.console import Console

    return Console(stderr=error, highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)


def _text(parts: Sequence[Part], *, lines: bool = False) -> Text:
    from rich.text import Text

    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((plain(text, lines=lines), style) for text, style in pairs))


def _indented(text: str) -> str:
    """Indent further lines, so that none of them passes for a message of ours."""
    return text.replace("\n", "\n  ")
