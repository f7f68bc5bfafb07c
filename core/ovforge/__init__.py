"""ovforge: a plugin framework that takes models to Intel hardware with OpenVINO.

Importing this package is cheap: what needs openvino, pydantic or numpy is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovforge.config import PipelineConfig, Use
    from ovforge.errors import OvforgeError
    from ovforge.hookspecs import hookimpl
    from ovforge.pipeline import Pipeline, load
    from ovforge.planning import plan

__all__ = ["API_VERSION", "OvforgeError", "Pipeline", "PipelineConfig", "Use", "hookimpl", "load", "plan"]

__version__ = "0.1.0"

API_VERSION = 1
"""The version of the hooks and protocols; a plugin may state the one it was written for as OVFORGE_API."""

_HOMES = {
    "OvforgeError": "ovforge.errors",
    "Pipeline": "ovforge.pipeline",
    "PipelineConfig": "ovforge.config",
    "Use": "ovforge.config",
    "hookimpl": "ovforge.hookspecs",
    "load": "ovforge.pipeline",
    "plan": "ovforge.planning",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ovforge' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
