"""Shows what is in a model, and what protects its files. Listing it imports no openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["OVFORGE_API", "ovforge_commands"]

OVFORGE_API = 1


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield inspect."""
    yield CommandExtension(
        name="inspect",
        summary="Show what is in a model, and what encrypts it",
        factory="ovforge_inspect.command:inspect",
    )
