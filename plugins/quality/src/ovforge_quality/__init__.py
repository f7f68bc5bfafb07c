"""Quantization driven by quality: calibrated by the pipeline's own runs, and held to a score."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, DriverExtension

OVFORGE_API = 1


@hookimpl
def ovforge_drivers() -> Iterator[DriverExtension]:
    """Describe the driver of quantizers."""
    yield DriverExtension(
        name="quality",
        summary="Calibrate quantizers with the pipeline's own runs, and hold them to a score",
        factory="ovforge_quality.driver:QualityDriver",
        sections={
            "calibration": "ovforge_quality.sections:CalibrationSection",
            "quality": "ovforge_quality.sections:QualitySection",
        },
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Describe the command."""
    yield CommandExtension(
        name="quantize",
        summary="Quantize a model, calibrated by its own pipeline, and write it as a folder",
        factory="ovforge_quality.command:quantize",
    )
