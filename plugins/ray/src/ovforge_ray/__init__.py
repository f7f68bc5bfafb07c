"""Ray as the engine of `ovforge batch` and `ovforge serve`. Listing it imports no ray.

The engine is the entry point `ray` in the group "ovforge.engines"; this module only makes the plugin known, so that it
is listed, and can be switched off.
"""

from __future__ import annotations

__all__ = ["OVFORGE_API"]

OVFORGE_API = 1
