"""Models and schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import LoaderExtension, SchedulerExtension


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """The converter."""
    yield LoaderExtension(
        name="diffusers",
        summary="Convert a diffusers folder (safetensors) with PyTorch",
        config="ovforge_diffusers.loader:DiffusersOptions",
        factory="ovforge_diffusers.loader:DiffusersLoader",
        converts=True,
    )


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """The adapter."""
    yield SchedulerExtension(
        name="diffusers",
        summary="Any scheduler class of diffusers",
        config="ovforge_diffusers.scheduler:AdapterOptions",
        factory="ovforge_diffusers.scheduler:DiffusersScheduler",
    )
