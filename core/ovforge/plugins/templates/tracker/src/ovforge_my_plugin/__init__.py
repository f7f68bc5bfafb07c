"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import TrackerExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_trackers() -> Iterator[TrackerExtension]:
    """Describe the tracker; its module is imported when a config names it."""
    yield TrackerExtension(
        name="my-plugin",
        summary="By the overlap of boxes with those of the picture before",
        config="ovforge_my_plugin.tracker:Options",
        factory="ovforge_my_plugin.tracker:Tracker",
        every_picture=True,
    )
