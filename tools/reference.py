"""The reference pages of the site, from the program itself: its commands' help, and the keys of configs.

python tools/reference.py cli       # print a page; the site makes them by tools/site.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from ovforge.cli import app
from ovforge.cli.program import make_command
from ovforge.config.pipeline import Load, PipelineConfig
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins

KINDS = {
    "task": "Tasks",
    "source": "Sources",
    "loader": "Loaders",
    "transform": "Transforms",
    "quantizer": "Quantizers",
    "driver": "Drivers",
    "scheduler": "Schedulers",
    "device": "Devices",
}


def plugins() -> Plugins:
    """Return the plugins of the catalogue that ships, whatever the user's own says."""
    return Plugins(Registry.packaged())


def commands() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command: ("run",), ("plugins", "new")..."""
    known = plugins()
    for name in known.summaries("command"):
        command = make_command(known.find("command", name))
        inner = getattr(command, "commands", {})
        yield from ([(name, each) for each in inner] or [(name,)])


def help_of(words: tuple[str, ...]) -> str:
    """Return what `ovforge WORDS --help` prints."""
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="ovforge", env={"COLUMNS": "88"})
    if result.exit_code:
        raise RuntimeError(f"ovforge {' '.join(words)} --help: {result.output}") from result.exception
    return result.output.strip()


def cli_page() -> str:
    """Return the page of all commands."""
    parts = ["# Commands", "This page is what `--help` prints, for every command.", _block(help_of(()))]
    for words in commands():
        parts += [f"## ovforge {' '.join(words)}", _block(help_of(words))]
    return "\n\n".join(parts) + "\n"


def config_page() -> str:
    """Return the page of all keys: of configs, and of every extension."""
    known = plugins()
    parts = [
        "# Config",
        "Every key of a config, from the program itself. An extension is named by `use`; its options stand beside it. "
        "`ovforge schema` prints the same for editors.",
        "## Top level",
        _table(PipelineConfig),
        "## load",
        "The loader's own options stand beside these.",
        _table(Load),
    ]
    for kind, title in KINDS.items():
        parts.append(f"## {title}")
        for name, summary in known.summaries(kind).items():
            extension = known.find(kind, name).extension
            parts += [f"### {kind} {name}", f"{_text(summary)}."]
            options = extension.options_model()
            if options is not None and options.model_fields:
                parts.append(_table(options))
            if kind == "task":
                parts += ["Inputs, in `[input]` or by `-i`:", _table(extension.inputs_model())]
    return "\n\n".join(parts) + "\n"


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else _value(info.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {_type(info.annotation)} | {default} | {_text(info.description or '')} |")
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    """Return a type in plain words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not NoneType))
    if origin is Literal:
        return ", ".join(f"`{_plain(value)}`" for value in arguments)
    if origin in (list, tuple, set, frozenset):
        inner = dict.fromkeys(f"{_type(part)}s" for part in arguments if part is not Ellipsis)
        return f"list of {' or '.join(inner)}" if inner else "list"
    if origin is dict or annotation is dict:
        return "table"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "value"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "name or table" if annotation.__name__ == "Use" else "table"
    return words.get(annotation, "value")


def _value(value: Any) -> str:
    if value is None or value in ((), [], {}, frozenset()):
        return ""
    if isinstance(value, BaseModel):
        return f"`{value.use}`" if hasattr(value, "use") else ""
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def _text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    typer.echo({"cli": cli_page, "config": config_page}[sys.argv[1]]())
