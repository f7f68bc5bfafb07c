"""Importing what conversion needs, with an error that says how to get it."""

from __future__ import annotations

import importlib
from typing import Any

from ovforge.errors import PluginError

__all__ = ["need"]


def need(name: str) -> Any:
    """Import a module. Raises PluginError with the extra to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PluginError(
            f"{name} is not installed ({error})",
            where="plugin diffusers",
            hint='Run: pip install "ovforge-diffusers[convert]"',
        ) from error
