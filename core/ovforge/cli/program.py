"""The program `ovforge`: it finds the commands that plugins offer, ours among them, and runs the one that is named.

Only what a command needs is imported when it runs: `ovforge --help` imports no openvino.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ovforge._version import __version__
from ovforge.cli.output import plain, prepare_streams, print_block, print_error, print_line, print_note, print_warning
from ovforge.errors import ConfigError, OvforgeError, UnknownNameError, did_you_mean
from ovforge.run.calls import blaming

if TYPE_CHECKING:
    from ovforge.plugins.manager import Offer, Plugins

__all__ = ["app", "main", "make_command"]

_OURS = "ovforge.cli."
_COMPLETION = ("install_completion", "show_completion")
_start = time.time()
_debug = False
"""Whether the traceback of an error that is explained is printed, too."""


class _Program(TyperGroup):
    """Commands are listed by their summaries, and imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        plugins, broken = _plugins(ctx)
        if broken is not None:
            print_warning(str(broken))
        return list(plugins.summaries("command"))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command to be listed; `resolve_command` returns the one to be run."""
        summary = _plugins(ctx)[0].summaries("command").get(cmd_name)
        summary = None if summary is None else plain(summary)
        return None if summary is None else TyperCommand(cmd_name, short_help=summary, help=summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        plugins, broken = _plugins(ctx)
        try:
            offer = plugins.find("command", args[0])
        except UnknownNameError:
            near = did_you_mean(args[0], plugins.summaries("command"))
            ctx.fail(f"No such command {args[0]!r}.{near}")
        if broken is not None and offer.plugin != "builtin":
            raise broken  # it may say that this plugin is switched off
        ctx.meta[_OURS] = offer
        return args[0], make_command(offer), args[1:]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _print_interrupted()
            raise typer.Exit(130) from None
        except Exception as error:
            offer = ctx.meta.get(_OURS)
            if offer is None or offer.plugin == "builtin" or _is_for_users(error):
                raise
            with blaming(offer):
                raise


def _is_for_users(error: Exception) -> bool:
    """Say whether an error of a command is one that the program explains, or a way to end it."""
    ends = hasattr(error, "exit_code")  # typer.Exit, and errors of usage
    return ends or isinstance(error, OvforgeError | OSError | EOFError | typer.Abort)


def _plugins(ctx: Any) -> tuple[Plugins, ConfigError | None]:
    """Return the plugins, and what is wrong with the user's catalogue; it is then left out."""
    from ovforge.plugins.catalogue import Registry
    from ovforge.plugins.manager import Plugins

    key = f"{_OURS}plugins"
    if key not in ctx.meta:
        try:
            ctx.meta[key] = Plugins(), None
        except ConfigError as error:
            ctx.meta[key] = Plugins(Registry.packaged()), error
    found: tuple[Plugins, ConfigError | None] = ctx.meta[key]
    return found


def make_command(offer: Offer) -> Any:
    """Return what typer runs for a command: of a function, with its own docstring as help, or of a typer.Typer.

    Raises PluginError if the plugin's factory is neither, or if typer cannot make options of its parameters.
    """
    from ovforge.contracts.extensions import resolve

    name, target = offer.extension.name, resolve(offer.extension.factory)
    with blaming(offer):  # typer checks the parameters of whatever it gets
        if not isinstance(target, typer.Typer):
            application = typer.Typer(add_completion=False, rich_markup_mode=None)
            application.command(name, help=target.__doc__ or offer.extension.summary)(target)
            target = application
        command = typer.main.get_command(target)
    command.name, command.help = name, command.help and plain(command.help, lines=True)
    # Completion is installed for the whole program.
    command.params = [option for option in command.params if option.name not in _COMPLETION]
    return command


app = typer.Typer(
    cls=_Program,
    help="Take generative and vision models to Intel hardware with OpenVINO.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(value: bool) -> None:
    if value:
        print_line(f"ovforge {__version__}")
        raise typer.Exit


def _set_debug(value: bool) -> None:
    global _debug
    _debug = value


def _set_verbose(value: bool) -> None:
    if value:
        import logging

        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("ovforge").setLevel(logging.INFO)


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", callback=_set_verbose, is_eager=True,
        help="Say which plugins are imported, what is found in the cache, and what is made.",
    ),
    debug: bool = typer.Option(
        False, "--debug", callback=_set_debug, is_eager=True,
        help="Print the traceback of an error, too: ovforge --debug run pipeline.toml",
    ),
) -> None:  # fmt: skip
    """Take generative and vision models to Intel hardware with OpenVINO."""


def main() -> None:
    """Run the program. Exit codes: 0 done, 1 an explained error, 2 wrong usage, 130 ended by Ctrl-C or SIGTERM."""
    prepare_streams()
    # By default it would end us at once: what is half written would stay, and child processes would run on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except OvforgeError as error:
        _explain(error, error)
        sys.exit(1)
    except OSError as error:
        from ovforge.cli.system import system_error

        _explain(system_error(error), error)
        sys.exit(1)
    except KeyboardInterrupt:
        _print_interrupted()
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


def _print_interrupted() -> None:
    """Say that the program was interrupted, and which finished stages the next run finds again."""
    print_note("interrupted")
    store = sys.modules.get("ovforge.store.cache")
    if store is None:
        return
    with contextlib.suppress(OvforgeError, OSError):
        kept = [entry.label for entry in store.Cache.default().entries() if entry.created >= _start]
        if kept:
            print_note(f"kept in the cache for the next run: {', '.join(kept)}")


def _explain(explained: OvforgeError, error: BaseException) -> None:
    """Print an error in words; with --debug, after the traceback that led to it."""
    if _debug:
        import traceback

        print_block("".join(traceback.format_exception(error)).rstrip(), error=True)
    print_error(explained)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print_warning(str(message))
