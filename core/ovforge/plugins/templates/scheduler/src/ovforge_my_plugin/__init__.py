"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import SchedulerExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """Describe the scheduler; its module is imported when a pipeline samples with it."""
    yield SchedulerExtension(
        name="my-plugin",
        summary="Deterministic DDIM",
        config="ovforge_my_plugin.scheduler:Options",
        factory="ovforge_my_plugin.scheduler:Scheduler",
    )
