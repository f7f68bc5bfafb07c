"""What a plugin offers and what it implements: hooks, descriptions, and the protocols of the stages.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.contracts.extensions import (
        CommandExtension,
        DeviceExtension,
        Extension,
        GraphTransformExtension,
        LoaderExtension,
        Need,
        QuantizerExtension,
        SchedulerExtension,
        SourceExtension,
        TaskExtension,
    )
    from ovforge.contracts.hookspecs import hookimpl
    from ovforge.contracts.stages import (
        Adapter,
        Calibration,
        CompiledModels,
        Device,
        DevicePlan,
        GraphTransform,
        Loader,
        Match,
        Phase,
        Progress,
        Quantizer,
        RandomStream,
        Report,
        Sampling,
        Scheduler,
        Skipped,
        Task,
        TaskContext,
        ignore_progress,
    )

__all__ = [
    "Adapter",
    "Calibration",
    "CommandExtension",
    "CompiledModels",
    "Device",
    "DeviceExtension",
    "DevicePlan",
    "Extension",
    "GraphTransform",
    "GraphTransformExtension",
    "Loader",
    "LoaderExtension",
    "Match",
    "Need",
    "Phase",
    "Progress",
    "Quantizer",
    "QuantizerExtension",
    "RandomStream",
    "Report",
    "Sampling",
    "Scheduler",
    "SchedulerExtension",
    "Skipped",
    "SourceExtension",
    "Task",
    "TaskContext",
    "TaskExtension",
    "hookimpl",
    "ignore_progress",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "extensions": [
            "CommandExtension",
            "DeviceExtension",
            "Extension",
            "GraphTransformExtension",
            "LoaderExtension",
            "Need",
            "QuantizerExtension",
            "SchedulerExtension",
            "SourceExtension",
            "TaskExtension",
        ],
        "hookspecs": ["hookimpl"],
        "stages": [
            "Adapter",
            "Calibration",
            "CompiledModels",
            "Device",
            "DevicePlan",
            "GraphTransform",
            "Loader",
            "Match",
            "Phase",
            "Progress",
            "Quantizer",
            "RandomStream",
            "Report",
            "Sampling",
            "Scheduler",
            "Skipped",
            "Task",
            "TaskContext",
            "ignore_progress",
        ],
    },
)
