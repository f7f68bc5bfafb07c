"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import DeviceExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_devices() -> Iterator[DeviceExtension]:
    """Describe the device; its module is imported when a config names it."""
    yield DeviceExtension(
        name="my-plugin",
        summary="The processor, with a limited number of threads",
        config="ovforge_my_plugin.device:Options",
        factory="ovforge_my_plugin.device:Device",
    )
