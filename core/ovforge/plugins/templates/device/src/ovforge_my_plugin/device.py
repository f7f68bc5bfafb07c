"""The device itself: it decides how models are compiled; compiling them is ovforge's work."""

from __future__ import annotations

import os

from ovforge.contracts import DevicePlan
from ovforge.errors import DeviceError
from ovforge.model import core
from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a config may say. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = Field(1, ge=1, description="How many threads to use.")


class Device:
    """The processor, with a limited number of threads."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def plan(self) -> DevicePlan:
        """Check that the machine has so many processors, and return how to compile for them."""
        here = os.cpu_count() or 1
        if self.options.threads > here:
            raise DeviceError(
                f"{self.options.threads} threads are more than the {here} processors of this machine",
                where="device.threads",
                hint=f"Set it to {here} or less.",
            )
        return DevicePlan(
            device="CPU",
            properties={"INFERENCE_NUM_THREADS": self.options.threads, "INFERENCE_PRECISION_HINT": "f32"},
            full_name=str(core().get_property("CPU", "FULL_DEVICE_NAME")),
            precision="f32",
            can_export="EXPORT_IMPORT" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        )
