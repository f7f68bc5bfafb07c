"""ovforge plugins: list, show, doctor, enable, disable, new."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovforge.cli.output import Part, print_line, print_table
from ovforge.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from ovforge.plugins.manager import PluginStatus

__all__ = ["app"]

app = typer.Typer(help="What is installed, and what it offers.", no_args_is_help=True)

_COLOURS = {"set aside": "red", "disabled": "yellow", "not installed": "dim"}
Name = Annotated[str, typer.Argument(help="A plugin's name, as `ovforge plugins list` shows it.")]


def _statuses(imported: bool) -> list[PluginStatus]:
    from ovforge.plugins.manager import Plugins

    plugins = Plugins()
    if imported:
        plugins.import_all()
    return plugins.statuses()


def _status(name: str, imported: bool) -> PluginStatus:
    statuses = {status.name: status for status in _statuses(imported)}
    if name not in statuses:
        raise PluginError(
            f"unknown.{did_you_mean(name, statuses)}", where=f"plugin {name!r}", hint=f"Known: {', '.join(statuses)}."
        )
    return statuses[name]


@app.command(name="list")
def list_() -> None:
    """List plugins: installed, switched off, or in the catalogue only. Imports none."""
    rows: list[list[Part]] = [
        [
            status.name,
            status.version or "",
            (status.state, _COLOURS.get(status.state, "green")),
            ", ".join(f"{kind} {name}" for kind, names in status.provides.items() for name in names) or "?",
            status.summary,
        ]
        for status in _statuses(imported=False)
    ]
    print_table(["plugin", "version", "state", "provides", "summary"], rows, fold=["provides", "summary"])


@app.command()
def show(name: Name) -> None:
    """Show one plugin: what it offers, with the options of each."""
    from ovforge.plugins.manager import Plugins

    status = _status(name, imported=True)
    print_line(f"{status.name} {status.version or ''} ({status.distribution}): {status.state}")
    for line in (status.summary, status.reason, f"parts of it need: {', '.join(status.needs)}" if status.needs else ""):
        if line:
            print_line(f"  {line}")
    plugins = Plugins()
    for kind, names in status.provides.items():
        for offered, summary in names.items():
            print_line()
            print_line(f"{kind} {offered}: {summary}")
            if status.state not in ("imported", "built in"):
                continue
            model = plugins.find(kind, offered).extension.options_model()
            for field, info in (model.model_fields if model else {}).items():
                default = (
                    "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
                )
                print_line(f"  {field}: {default}{f'. {info.description}' if info.description else ''}")


@app.command()
def doctor() -> None:
    """Import every plugin and say what is wrong with any. Exit code 1 where something is."""
    import platform

    from ovforge.plugins.catalogue import user_registry_path

    statuses = _statuses(imported=True)
    for status in statuses:
        mark = {"set aside": "BROKEN ", "imported": "ok     ", "built in": "ok     "}.get(
            status.state, f"{status.state:<7}"
        )
        print_line(
            f"{mark} {status.name} {status.version or ''} {f'- {status.reason}' if status.reason else ''}".rstrip()
        )
    print_line()
    print_line(f"your own catalogue: {user_registry_path()}{'' if user_registry_path().is_file() else ' (not there)'}")
    print_line(f"python {platform.python_version()} on {platform.platform()}")
    raise typer.Exit(1 if any(status.state == "set aside" for status in statuses) else 0)


@app.command()
def enable(name: Name) -> None:
    """Switch a plugin on."""
    _switch(name, True)


@app.command()
def disable(name: Name) -> None:
    """Switch a plugin off: it is not imported, and what it offers is not to be had."""
    _switch(name, False)


def _switch(name: str, enabled: bool) -> None:
    from ovforge.plugins.catalogue import set_enabled

    if _status(name, imported=False).state == "built in":
        raise PluginError("is part of ovforge and cannot be switched off", where=name)
    path = set_enabled(name, enabled)
    print_line(f"{name} is {'on' if enabled else 'off'}, in {path}")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The plugin's name: lower-case words joined by hyphens.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where to put the project.")] = Path(),
) -> None:
    """Write a new plugin's project, with a graph transform and its tests, ready to change."""
    from ovforge.plugins.template import write_project

    print_line(f"{write_project(name, folder)}: pip install -e it, then run pytest there")
