"""Finding plugins: the catalogue, and what each plugin offers.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.plugins.manager import Offer, Plugins, PluginStatus

__all__ = ["Offer", "PluginStatus", "Plugins"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "manager": ["Offer", "PluginStatus", "Plugins"],
    },
)
