"""The version of this distribution, and of the hooks and protocols that plugins are written for."""

from __future__ import annotations

__all__ = ["API_VERSION", "__version__"]

__version__ = "0.1.0"

API_VERSION = 1
"""The version of the hooks and protocols; a plugin may state the one it was written for as OVFORGE_API."""
