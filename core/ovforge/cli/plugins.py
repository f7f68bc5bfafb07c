"""ovforge plugins: list, show, doctor, enable, disable, new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovforge.cli.output import Part, print_line, print_table
from ovforge.errors import ConfigError, PluginError, did_you_mean

if TYPE_CHECKING:
    from ovforge.plugins.manager import Plugins, PluginStatus

__all__ = ["app"]

app = typer.Typer(help="What is installed, and what it offers.", no_args_is_help=True, rich_markup_mode=None)

_COLOURS = {"set aside": "red", "disabled": "yellow", "not installed": "dim"}
Name = Annotated[str, typer.Argument(help="A plugin's name, as `ovforge plugins list` shows it.")]


def _find(statuses: Sequence[PluginStatus], name: str) -> PluginStatus:
    known = {status.name: status for status in statuses}
    if name not in known:
        raise PluginError(
            f"unknown.{did_you_mean(name, known)}", where=f"plugin {name!r}", hint=f"Known: {', '.join(known)}."
        )
    return known[name]


@app.command(name="list")
def list_() -> None:
    """List plugins: installed, switched off, or in the catalogue only. Imports none.

    Example: ovforge plugins list
    """
    from ovforge.plugins.manager import Plugins

    rows: list[list[Part]] = [
        [
            status.name,
            status.version or "",
            (status.state, _COLOURS.get(status.state, "green")),
            ", ".join(f"{kind} {name}" for kind, names in status.provides.items() for name in names) or "?",
            status.summary,
        ]
        for status in Plugins().statuses()
    ]
    print_table(["plugin", "version", "state", "provides", "summary"], rows, fold=["provides", "summary"])


@app.command()
def show(name: Name) -> None:
    """Show one plugin: what it offers, with the options of each. Exit code 1 if it cannot be used.

    Example: ovforge plugins show schedulers
    """
    from ovforge.plugins.manager import Plugins

    plugins = Plugins()
    plugins.import_all()
    status = _find(plugins.statuses(), name)
    usable = status.state in ("imported", "built in")
    wrong, absent = plugins.problems(status.name) if usable else ([], [])
    print_line(f"{status.name} {status.version or ''} ({status.distribution}): {status.state}")
    lines = [status.summary, status.reason, *(f"broken: {problem}" for problem in wrong)]
    if status.needs:
        lines.append(f"parts of it need: {', '.join(status.needs)}")
    if absent:
        lines.append(f"not installed: {', '.join(absent)}")
    for line in filter(None, lines):
        print_line(f"  {line}")
    for kind, names in status.provides.items():
        for offered, summary in names.items():
            print_line()
            print_line(f"{kind} {offered}: {summary}")
            if usable:
                _print_options(plugins, kind, offered)
    if wrong or status.state in ("set aside", "not installed"):
        raise typer.Exit(1)


def _print_options(plugins: Plugins, kind: str, name: str) -> None:
    try:
        model = plugins.find(kind, name).extension.options_model()
    except PluginError as error:  # such as a recipe whose quantizer is not here
        print_line(f"  not usable: {error.what}{f'. {error.hint}' if error.hint else ''}")
        return
    for field, info in getattr(model, "model_fields", {}).items():
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        print_line(f"  {field}: {default}{f'. {info.description}' if info.description else ''}")


@app.command()
def doctor() -> None:
    """Import every plugin and all that it names, and say what is wrong with any. Exit code 1 if something is.

    Example: ovforge plugins doctor
    """
    import platform

    from ovforge.plugins.catalogue import Registry, user_registry_path
    from ovforge.plugins.manager import Plugins

    broken = False
    path = user_registry_path()
    try:
        plugins = Plugins()
        catalogue = str(path) if path.exists() else f"{path} (not there)"
    except ConfigError as error:
        plugins, broken = Plugins(Registry.packaged()), True
        catalogue = f"BROKEN, and left out here:\n  {error.where}: {error.what}\n  {error.hint}"
    plugins.import_all()
    for status in plugins.statuses():
        wrong, absent = plugins.problems(status.name) if status.state in ("imported", "built in") else ([], [])
        mark = {"set aside": "BROKEN", "imported": "ok", "built in": "ok"}.get(status.state, status.state)
        mark = "BROKEN" if wrong else mark
        broken = broken or mark == "BROKEN"
        reason = status.reason or (f"parts of it wait for: {', '.join(absent)}" if absent else "")
        print_line(f"{mark:<7} {status.name} {status.version or ''} {f'- {reason}' if reason else ''}".rstrip())
        for problem in wrong:
            print_line(f"          {problem}")
    print_line()
    print_line(f"your own catalogue: {catalogue}")
    print_line(f"python {platform.python_version()} on {platform.platform()}")
    raise typer.Exit(1 if broken else 0)


@app.command()
def enable(name: Name) -> None:
    """Switch a plugin on.

    Example: ovforge plugins enable schedulers
    """
    _switch(name, True)


@app.command()
def disable(name: Name) -> None:
    """Switch a plugin off: it is not imported, and what it offers is not available.

    Example: ovforge plugins disable schedulers
    """
    _switch(name, False)


def _switch(name: str, enabled: bool) -> None:
    from ovforge.plugins.catalogue import set_enabled
    from ovforge.plugins.manager import Plugins

    if _find(Plugins().statuses(), name).state == "built in":
        raise PluginError("is part of ovforge and cannot be switched off", where=name)
    path = set_enabled(name, enabled)
    print_line(f"{name} is {'on' if enabled else 'off'}, in {path}")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The plugin's name: lower-case words joined by hyphens.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="What it offers: transform, loader, quantizer, scheduler, device, task, tracker or command."
        ),
    ] = "transform",
    folder: Annotated[Path, typer.Option("--folder", help="Where to put the project.")] = Path(),
) -> None:
    """Write a new plugin's project, a small and complete one with its tests, ready to change.

    Example: ovforge plugins new my-plugin --kind loader
    """
    from ovforge.plugins.template import write_project

    print_line(f"{write_project(name, folder, kind)}: run pip install -e '.[test]' and then pytest there")
