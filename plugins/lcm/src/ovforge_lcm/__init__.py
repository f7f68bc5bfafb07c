"""Latent consistency models (Luo et al. 2023): the scheduler, and a small model that ships with it."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import SchedulerExtension

__all__ = ["EMBEDDED_MODEL"]

EMBEDDED_MODEL = "package:ovforge_lcm/model"
"""What a config's `load.source` says for the embedded model."""


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """The LCM scheduler."""
    yield SchedulerExtension(
        name="lcm",
        summary="Latent consistency sampling, in a few steps",
        config="ovforge_lcm.scheduler:LCMOptions",
        factory="ovforge_lcm.scheduler:LCMScheduler",
        implements=("LCMScheduler",),
    )
