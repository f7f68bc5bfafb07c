"""The program `ovforge`. Only what a command needs is imported when it runs: `ovforge --help` imports no openvino."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from ovforge._version import __version__
from ovforge.cli.output import plain, prepare_streams, print_block, print_error, print_line, print_note, print_warning
from ovforge.errors import OvforgeError, PluginError

__all__ = ["app", "main"]


_RUNS = "ovforge.runs"
"""Set while a command is looked up to be run, not to be listed."""


class _Group(TyperGroup):
    """The built-in commands, then those of plugins: listed from the catalogue, imported when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in _offered() if name not in self.commands)]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_note("interrupted")
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta[_RUNS] = True
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        summary = _offered().get(cmd_name)
        if summary is not None and not ctx.meta.get(_RUNS):
            listed = typer.Typer(add_completion=False, rich_markup_mode=None)
            listed.command(cmd_name, help=summary)(lambda: None)
            return typer.main.get_command(listed)
        return _plugin_command(cmd_name)


def _offered() -> dict[str, str]:
    """Return command -> summary of the plugins in the catalogue that are installed."""
    from importlib.metadata import entry_points

    from ovforge.contracts.hookspecs import ENTRY_POINT_GROUP
    from ovforge.plugins.catalogue import Registry

    registry = Registry.load()
    here = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return {
        name: plain(summary)
        for record in registry.records.values()
        if record.name in here and record.name not in registry.disabled
        for name, summary in record.provides.get("command", {}).items()
    }


def _plugin_command(name: str) -> Any:
    """Return a command that a plugin offers, or None for typer to say that there is none."""
    from ovforge.contracts.extensions import resolve
    from ovforge.plugins.manager import Plugins

    try:
        offer = Plugins().find("command", name)
    except PluginError as error:
        if "unknown" in error.what:
            return None
        raise
    target = resolve(offer.extension.factory)
    if not isinstance(target, typer.Typer):
        application = typer.Typer(add_completion=False, rich_markup_mode=None)
        application.command(name, help=offer.extension.summary)(target)
        target = application
    command = typer.main.get_command(target)
    command.name, command.help = name, command.help and plain(command.help, lines=True)
    return command


app = typer.Typer(
    cls=_Group,
    help="Take generative and vision models to Intel hardware with OpenVINO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print_line(f"ovforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Take generative and vision models to Intel hardware with OpenVINO."""


def main() -> None:
    """Run the program. Exit codes: 0 done, 1 an error that is explained, 2 wrong usage, 130 interrupted."""
    prepare_streams()
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except OvforgeError as error:
        print_error(error)
        sys.exit(1)
    except OSError as error:
        from ovforge.cli.system import system_error

        print_error(system_error(error))
        sys.exit(1)
    except KeyboardInterrupt:
        print_note("interrupted")
        sys.exit(130)
    except typer.Abort:
        print_note("aborted")
        sys.exit(1)
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        # Wrong usage, as the library that reads command lines words it: with what was typed.
        words = io.StringIO()
        error.show(file=words)
        print_block(words.getvalue().rstrip(), error=True)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print_warning(str(message))


from ovforge.cli import cache, clean, inspect, pipelines, plugins  # noqa: E402

pipelines.register(app)
inspect.register(app)
app.command()(clean.clean)
app.add_typer(plugins.app, name="plugins")
app.add_typer(cache.app, name="cache")
