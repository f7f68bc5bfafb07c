"""Calls into plugins: whatever goes wrong there is told with the plugin's name, and what it returns is checked."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ovforge.errors import ConfigError, OvforgeError, PluginError

if TYPE_CHECKING:
    from ovforge.contracts.stages import Progress
    from ovforge.plugins.manager import Offer

__all__ = ["blaming", "expect", "from_caller"]

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CALLER = "_ovforge_caller"


@contextlib.contextmanager
def blaming(offer: Offer) -> Iterator[None]:
    """Turn an exception of a plugin's code into a PluginError that names the plugin and its extension.

    Errors that explain themselves pass, and so do Ctrl-C, a full disk or memory, warnings that were made errors, and
    whatever a caller's own progress callback raises. A plugin that ends the program (SystemExit) does not.
    """
    try:
        yield
    except (OvforgeError, Warning, MemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if hasattr(error, _CALLER) or (isinstance(error, OSError) and error.errno in _FULL):
            raise
        text = str(error).strip().partition("\n")[0]
        raise PluginError(
            f"it raised {type(error).__name__}{f': {text}' if text else ''}",
            where=_name(offer),
            hint="This is a fault of the plugin: report it to its authors with what `ovforge --debug` shows.",
        ) from error


def expect(kind: type[T] | str, value: Any, offer: Offer) -> T:
    """Return what a plugin's code gave, if it is of a class, or has a method of that name. Raises PluginError."""
    fits = hasattr(value, kind) if isinstance(kind, str) else isinstance(value, kind)
    if not fits:
        wanted = f"something with `{kind}`" if isinstance(kind, str) else f"a {kind.__name__}"
        given = "None" if value is None else f"something of type {type(value).__name__}"
        raise PluginError(
            f"it returned {given} instead of {wanted}",
            where=_name(offer),
            hint="This is a fault of the plugin: report it to its authors.",
        )
    result: T = value
    return result


def from_caller(progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return a caller's callback whose exceptions are not taken for those of a plugin.

    Raises ConfigError if it cannot be called.
    """
    if not callable(progress):
        raise ConfigError("it cannot be called", where="progress", hint="Give a function that takes a Progress.")

    def report(moment: Progress) -> None:
        try:
            progress(moment)
        except BaseException as error:
            setattr(error, _CALLER, True)
            raise

    return report


def _name(offer: Offer) -> str:
    if offer.plugin == "builtin":
        return f"{offer.extension.kind} {offer.extension.name!r}"
    return f"{offer.extension.kind} {offer.extension.name!r} of the plugin {offer.plugin} {offer.version}"
