"""Torch and its friends are an extra: what needs them asks here, and gets them or an error that says how to."""

from __future__ import annotations

import importlib
from typing import Any

from ovforge.errors import PluginError

__all__ = ["EXTRA", "need"]

EXTRA = 'pip install "ovforge-diffusers[convert]"'


def need(module: str, purpose: str) -> Any:
    """Import `module`. Raises PluginError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"{purpose} needs {module}: {error}", hint=f"Run: {EXTRA}") from error
