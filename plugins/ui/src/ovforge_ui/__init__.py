"""A page in the browser for any pipeline. Listing it imports neither gradio nor openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["OVFORGE_API", "ovforge_commands"]

OVFORGE_API = 1


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield the command."""
    yield CommandExtension(
        name="ui",
        summary="Open a page in the browser for any pipeline",
        factory="ovforge_ui.command:ui",
    )
