"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import GraphTransformExtension, Phase

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """Describe the transform; its module is imported when a config uses it."""
    yield GraphTransformExtension(
        name="my-plugin",
        summary="Multiply a model's outputs by a factor",
        config="ovforge_my_plugin.transform:Options",
        factory="ovforge_my_plugin.transform:Transform",
        phase=Phase.STRUCTURE,
    )
