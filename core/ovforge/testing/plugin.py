"""Contract tests of a plugin as a whole, and of the commands that it adds to the program."""

from __future__ import annotations

import contextlib
import io
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ovforge.cli.program import make_command
from ovforge.config.options import validate_options
from ovforge.contracts.extensions import DriverExtension, Extension, TaskExtension
from ovforge.contracts.hookspecs import HOOK_OF_KIND
from ovforge.errors import ConfigError, OvforgeError
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store.processes import run_python

__all__ = ["check_command", "check_plugin", "create", "extension", "plugins_of"]

HEAVY = ("torch", "diffusers", "transformers", "nncf", "tensorflow", "openvino")
"""Modules that a plugin must not import just to be listed."""

_UNDER_TEST = "under-test"


def extension(module: types.ModuleType, kind: str, name: str) -> Extension:
    """Return what `module` offers; it need not be installed."""
    return plugins_of(module).find(kind, name).extension


def create(module: types.ModuleType, kind: str, name: str, options: Mapping[str, Any], *more: Any) -> Any:
    """Return what an extension's factory makes of `options`, checked as those of a config are."""
    described = extension(module, kind, name)
    try:
        checked = validate_options(described.options_model(), options, where=name)
    except ConfigError as error:
        raise AssertionError(f"the options of the check are refused: {error}") from error
    return described.create(checked, *more)


def check_plugin(module: types.ModuleType, check_imports: bool = True) -> list[Extension]:
    """Check the rules for every plugin: it registers, names only what exists, refuses unknown options, imports lightly.

    Returns its extensions. `check_imports=False` leaves the last out, for a plugin whose own module must be heavy.
    """
    plugins = plugins_of(module)
    offers = [offer.extension for kind in HOOK_OF_KIND for offer in plugins.all(kind) if offer.plugin == _UNDER_TEST]
    assert offers, f"{module.__name__} offers nothing: is each function marked with @hookimpl?"
    for offered in offers:
        for problem in offered.problems():
            raise AssertionError(f"{offered.kind} {offered.name}: {problem}") from problem
        _check_strict(offered, "options", offered.options_model())
        if isinstance(offered, DriverExtension):
            for section in offered.sections:
                _check_strict(offered, f"section {section}", offered.section_model(section))
        if isinstance(offered, TaskExtension):
            _check_strict(offered, "inputs", offered.inputs_model())
            for name in offered.transforms:
                if any(other.kind == "transform" and other.name == name for other in offers):
                    _check_defaults(extension(module, "transform", name), f"{offered.name} brings it without any")
        if offered.kind == "source":
            _check_defaults(offered, "every source is shown to it, whatever the config says")
    if check_imports:
        _check_imports(module)
    return offers


def check_command(module: types.ModuleType, name: str, arguments: Sequence[str] | None = None) -> str:
    """Check a command: typer can make it, its help and that of its subcommands explains every argument and option.

    With `arguments`, also run it, and return what it printed on standard output. Errors of the command that the
    program would explain are raised; any other exception, or an exit code that is not 0, fails the check.
    """
    offer = plugins_of(module).find("command", name)
    _check_help(make_command(offer), [name])
    if arguments is None:
        return ""
    code, printed = _call(make_command(offer), name, arguments)
    assert code == 0, f"`{' '.join([name, *arguments])}` ends with the exit code {code}: {printed}"
    return printed


def _check_help(command: Any, path: list[str]) -> None:
    """Check the help of a command and, if it is a group, of each subcommand."""
    shown = " ".join(path)
    code, printed = _call(command, shown, ["--help"])
    assert code == 0, f"`{shown} --help` ends with the exit code {code}"
    assert printed.strip(), f"`{shown} --help` prints nothing"
    assert command.help, f"`{shown}` has no help: give the function a docstring"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"`{shown}`: {parameter.name} has no help, so that nobody can guess it"
    for name, inner in getattr(command, "commands", {}).items():
        _check_help(inner, [*path, name])


def _call(command: Any, name: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command as the program does; return its exit code and what it printed on standard output."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            command.main(list(arguments), prog_name=f"ovforge {name}")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return code, printed.getvalue()
    except (OvforgeError, OSError):
        raise
    except Exception as error:
        raise AssertionError(f"`{name}` raises {type(error).__name__}, which no user can act upon: {error}") from error
    return 0, printed.getvalue()


def _check_strict(offered: Extension, what: str, model: Any) -> None:
    assert model is None or model.model_config.get("extra") == "forbid", (
        f'the {what} of {offered.name} must have extra="forbid": a misspelt key would be ignored in silence'
    )


def _check_defaults(offered: Extension, why: str) -> None:
    try:
        validate_options(offered.options_model(), {}, where=offered.name)
    except ConfigError as error:
        raise AssertionError(f"{error}: the options of this {offered.kind} must have defaults, since {why}") from error


def plugins_of(module: types.ModuleType) -> Plugins:
    """Return plugins of which `module` is the only one, beside what is built in."""
    plugins = Plugins(Registry({}), found=())
    plugins.register(module, _UNDER_TEST)
    return plugins


def _check_imports(module: types.ModuleType) -> None:
    """Import the module in a fresh interpreter and look for heavy modules."""
    code = f"import sys, {module.__name__}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = run_python(["-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module.__name__} cannot be imported alone: {done.stderr[-500:]}"
    heavy = done.stdout.split()
    assert not heavy, (
        f"importing {module.__name__} imports {', '.join(heavy)}: name factories as import strings, so that "
        "listing plugins stays fast"
    )
