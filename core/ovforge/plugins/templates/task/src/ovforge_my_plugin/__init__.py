"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import TaskExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Describe the task; its module is imported when a config names it."""
    yield TaskExtension(
        name="my-plugin",
        summary="Classify a list of numbers",
        config="ovforge_my_plugin.task:Options",
        inputs="ovforge_my_plugin.task:Inputs",
        factory="ovforge_my_plugin.task:Task",
        roles=("model",),
        threads=True,  # each call has an inference request of its own
    )
