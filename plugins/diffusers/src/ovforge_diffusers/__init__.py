"""Opens diffusers folders and checkpoints, and samples with any diffusers scheduler. Listing it imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import LoaderExtension, SchedulerExtension

__all__ = ["ovforge_loaders", "ovforge_schedulers"]


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """Yield the converting loader."""
    yield LoaderExtension(
        name="diffusers",
        summary="Convert a diffusers folder or checkpoint (safetensors) with PyTorch, one submodel at a time",
        config="ovforge_diffusers.options:LoaderOptions",
        factory="ovforge_diffusers.loader:DiffusersLoader",
        converts=True,
        in_memory=True,
        beside=("tokenizer*/*",),
    )


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """Yield the adapter; it stands for no class by itself, so that numpy schedulers come first."""
    yield SchedulerExtension(
        name="diffusers",
        summary="Any scheduler class of diffusers, run by diffusers itself (needs torch)",
        config="ovforge_diffusers.options:SchedulerOptions",
        factory="ovforge_diffusers.scheduler:DiffusersScheduler",
    )
