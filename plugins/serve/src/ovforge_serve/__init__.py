"""Serves pipelines over HTTP. Listing it imports neither FastAPI nor openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["OVFORGE_API", "ovforge_commands"]

OVFORGE_API = 1


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield serve."""
    yield CommandExtension(
        name="serve",
        summary="Serve pipelines and models over HTTP",
        factory="ovforge_serve.command:serve",
    )
