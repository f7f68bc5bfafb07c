"""Serves pipelines over HTTP, and writes them for other servers. Listing it imports neither FastAPI nor openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["OVFORGE_API", "ovforge_commands"]

OVFORGE_API = 1


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield serve and export."""
    yield CommandExtension(
        name="serve",
        summary="Serve pipelines and models over HTTP",
        factory="ovforge_serve.command:serve",
    )
    yield CommandExtension(
        name="export",
        summary="Write a pipeline's models as another server serves them",
        factory="ovforge_serve.export:export",
    )
