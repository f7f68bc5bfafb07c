"""The hooks: what a plugin may offer, on one screen.

A plugin is a module, registered under the entry-point group "ovforge", with any of these functions marked
`@ovforge.hookimpl`. Each yields descriptions and does nothing else: it may be called at any time, just to list.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ovforge.contracts.extensions import (
    CommandExtension,
    DeviceExtension,
    DriverExtension,
    GraphTransformExtension,
    LoaderExtension,
    QuantizerExtension,
    RecipeExtension,
    SchedulerExtension,
    SourceExtension,
    TaskExtension,
)

__all__ = ["ENTRY_POINT_GROUP", "HOOK_OF_KIND", "hookimpl", "hookspec"]

ENTRY_POINT_GROUP = "ovforge"

hookspec = pluggy.HookspecMarker("ovforge")
hookimpl = pluggy.HookimplMarker("ovforge")


@hookspec
def ovforge_sources() -> Iterable[SourceExtension]:
    """Ways to open what is not plain: encrypted files and folders."""
    return ()


@hookspec
def ovforge_loaders() -> Iterable[LoaderExtension]:
    """Ways to open a source: files, or another framework's model."""
    return ()


@hookspec
def ovforge_graph_transforms() -> Iterable[GraphTransformExtension]:
    """Changes to models: adapters, embeddings, folding, pre- and post-processing."""
    return ()


@hookspec
def ovforge_quantizers() -> Iterable[QuantizerExtension | RecipeExtension]:
    """Ways to lower a model's precision, and recipes: somebody's quantizer with options, under a name of their own."""
    return ()


@hookspec
def ovforge_drivers() -> Iterable[DriverExtension]:
    """Ways to calibrate quantizers, and to judge what they make."""
    return ()


@hookspec
def ovforge_schedulers() -> Iterable[SchedulerExtension]:
    """Sampling methods of diffusion models."""
    return ()


@hookspec
def ovforge_devices() -> Iterable[DeviceExtension]:
    """Places to run."""
    return ()


@hookspec
def ovforge_tasks() -> Iterable[TaskExtension]:
    """What a pipeline is for: text-to-image, detect, ..."""
    return ()


@hookspec
def ovforge_commands() -> Iterable[CommandExtension]:
    """Commands of the `ovforge` program."""
    return ()


HOOK_OF_KIND = {
    "source": "ovforge_sources",
    "loader": "ovforge_loaders",
    "transform": "ovforge_graph_transforms",
    "quantizer": "ovforge_quantizers",
    "driver": "ovforge_drivers",
    "scheduler": "ovforge_schedulers",
    "device": "ovforge_devices",
    "task": "ovforge_tasks",
    "command": "ovforge_commands",
}
