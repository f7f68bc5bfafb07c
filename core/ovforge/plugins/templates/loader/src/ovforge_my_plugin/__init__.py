"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import LoaderExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """Describe the loader; its module is imported when a source is looked at."""
    yield LoaderExtension(
        name="my-plugin",
        summary="A multilayer perceptron in an .npz file of numpy",
        config="ovforge_my_plugin.loader:Options",
        factory="ovforge_my_plugin.loader:Loader",
    )
