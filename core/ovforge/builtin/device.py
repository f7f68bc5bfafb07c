"""OpenVINO's devices, checked for what they can really do before any work starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts.stages import DevicePlan
from ovforge.errors import DeviceError, did_you_mean
from ovforge.model.runtime import core

__all__ = ["AUTO", "CPU", "GPU", "NPU", "DeviceOptions", "processor_tunings"]

Precision = Literal["auto", "f32", "bf16", "f16"]
_CAPABILITY = {"bf16": "BF16", "f16": "FP16"}
_PRECISION = "INFERENCE_PRECISION_HINT"


class DeviceOptions(BaseModel):
    """How to run. What is left out, the device decides; the precision that ran is in the result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision = Field(
        "auto",
        description="Type of floating-point arithmetic. f32 is exact: it also keeps a processor from rounding what it "
        "multiplies compressed weights with to 8 bits.",
    )
    hint: Literal["latency", "throughput"] = Field("latency", description="What to optimise for.")
    threads: int | None = Field(None, ge=1, description="CPU threads.")
    streams: int | None = Field(None, ge=1, description="Inferences side by side.")
    index: int | None = Field(None, ge=0, description="Which of several devices of this kind.")
    properties: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further OpenVINO properties, by their names."
    )


def processor_tunings() -> Iterator[dict[str, Any]]:
    """Yield options for the processor: floats that it computes with in hardware, and other numbers of threads."""
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    yield from ({"precision": name} for name, needed in _CAPABILITY.items() if needed in capabilities)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # By default the runtime takes a thread for each physical core.
    yield from ({"threads": threads} for threads in dict.fromkeys((count, count // 2)) if threads > 0)
    yield {"hint": "throughput"}


class _OpenVinoDevice:
    kind: str

    def __init__(self, options: DeviceOptions) -> None:
        self.options = options

    def plan(self) -> DevicePlan:
        """Check and decide. Raises DeviceError that says what is there or possible instead."""
        device = self.kind if self.options.index is None else f"{self.kind}.{self.options.index}"
        full_name, capabilities, supported = self._facts(device)
        self._check_precision(device, capabilities)
        properties = self._properties()
        for key in properties:
            if key not in supported:
                raise DeviceError(
                    f"no property {key!r}.{did_you_mean(key, supported)}",
                    where=f"device {device}",
                    hint="Leave it out of device.properties, or choose another device.",
                )
        return DevicePlan(
            device=device,
            properties=properties,
            full_name=full_name,
            precision=self.options.precision,
            can_export="EXPORT_IMPORT" in capabilities,
        )

    def _facts(self, device: str) -> tuple[str, list[str], set[str]]:
        """Return (full name, capabilities, writable properties) of a device that is there."""
        available = core().available_devices
        if not any(name == device or name.startswith(f"{device}.") for name in available):
            raise DeviceError(
                "not on this machine, or its driver is missing",
                where=f"device {device}",
                hint=f"Here are: {', '.join(available) or 'none'}. Set device.use to one of them.",
            )
        supported = core().get_property(device, "SUPPORTED_PROPERTIES")
        writable = {name for name, access in supported.items() if access != "RO"}
        return (
            str(core().get_property(device, "FULL_DEVICE_NAME")),
            list(core().get_property(device, "OPTIMIZATION_CAPABILITIES")),
            writable,
        )

    def _check_precision(self, device: str, capabilities: list[str]) -> None:
        needed = _CAPABILITY.get(self.options.precision)
        if needed and needed not in capabilities:
            possible = ["f32", *(name for name, need in _CAPABILITY.items() if need in capabilities)]
            raise DeviceError(
                f"cannot compute in {self.options.precision}",
                where=f"device {device}",
                hint=f"Set device.precision to one of: auto, {', '.join(possible)}.",
            )

    def _properties(self) -> dict[str, Any]:
        options = self.options
        properties: dict[str, Any] = {"PERFORMANCE_HINT": options.hint.upper()}
        if options.precision != "auto":
            properties[_PRECISION] = options.precision
        if options.precision == "f32":
            properties["EXECUTION_MODE_HINT"] = "ACCURACY"
        if options.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = options.threads
        if options.streams is not None:
            properties["NUM_STREAMS"] = options.streams
        return {**properties, **options.properties}


class CPU(_OpenVinoDevice):
    """The processor."""

    kind = "CPU"


class GPU(_OpenVinoDevice):
    """An Intel GPU."""

    kind = "GPU"


class NPU(_OpenVinoDevice):
    """An Intel NPU."""

    kind = "NPU"


class AUTO(_OpenVinoDevice):
    """OpenVINO's choice among the devices that are there."""

    kind = "AUTO"

    def _facts(self, device: str) -> tuple[str, list[str], set[str]]:
        available = core().available_devices
        supported = core().get_property(device, "SUPPORTED_PROPERTIES")
        capabilities = {
            capability for name in available for capability in core().get_property(name, "OPTIMIZATION_CAPABILITIES")
        }
        # AUTO hands a model from one device to another while it runs, so there is no one blob to keep.
        return (
            f"AUTO of {', '.join(available)}",
            sorted(capabilities - {"EXPORT_IMPORT"}),
            {name for name, access in supported.items() if access != "RO"},
        )
