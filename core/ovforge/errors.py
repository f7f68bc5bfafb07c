"""One hierarchy of errors: each says what went wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CacheError",
    "Cancelled",
    "ConfigError",
    "DeviceError",
    "InputError",
    "ModelError",
    "OvforgeError",
    "PluginError",
    "QualityError",
    "UnknownNameError",
    "as_path",
    "did_you_mean",
    "require_type",
]


class OvforgeError(Exception):
    """An error that a user can act upon.

    `what` is one sentence. `where` names the file, key or option; `hint` says what to do next.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.hint}" if self.hint else head


class Cancelled(OvforgeError):
    """A progress callback ended the work; raise it there. The pipeline stays usable."""

    def __init__(self, what: str = "cancelled", *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, where=where, hint=hint)


class ConfigError(OvforgeError):
    """A pipeline config or an option in it is wrong."""


class PluginError(OvforgeError):
    """A plugin is unknown, not installed, switched off or broken."""


class UnknownNameError(PluginError):
    """No plugin, installed or in the catalogue, offers an extension of this name."""


class ModelError(OvforgeError):
    """A model file cannot be read, or does not hold what the pipeline needs."""


class DeviceError(OvforgeError):
    """A device is absent or cannot do what was asked of it."""


class InputError(OvforgeError):
    """An input of a task (a prompt, a size, a picture) is out of its range."""


class QualityError(OvforgeError):
    """A quantized pipeline does not come as close to the unquantized one as the config's [quality] asks."""


class CacheError(OvforgeError):
    """The cache cannot be read or written."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the choice nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_type(value: object, kinds: type | tuple[type, ...], *, where: str, hint: str | None = None) -> None:
    """Raise ConfigError if an argument of the Python API is not of one of the classes `kinds`; `where` names it."""
    if not isinstance(value, kinds):
        classes = kinds if isinstance(kinds, tuple) else (kinds,)
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in classes)
        given = "None" if value is None else f"of type {type(value).__name__}"
        raise ConfigError(f"it is {given}, and should be {names}", where=where, hint=hint)


def as_path(value: object, *, where: str) -> Path:
    """Return an argument that names a file or folder as a Path. Raises ConfigError for another type, and for ""."""
    require_type(value, (str, Path), where=where)
    if not str(value):
        raise ConfigError("it is empty", where=where, hint='Name a file or folder; "." is the current folder.')
    return Path(str(value))
