"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Describe the command: `ovforge --help` shows the summary, and its module is imported when it is called."""
    yield CommandExtension(
        name="my-plugin",
        summary="Say how alike two pictures are",
        factory="ovforge_my_plugin.command:compare",
    )
