"""What needs no plugin: models in the formats that OpenVINO reads by itself, and its devices."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge.contracts.extensions import DeviceExtension, LoaderExtension
from ovforge.contracts.hookspecs import hookimpl


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """The formats that OpenVINO reads."""
    yield LoaderExtension(
        name="openvino",
        summary="IR folders and files, ONNX, TensorFlow, TFLite and Paddle models",
        factory="ovforge.builtin.loader:NativeLoader",
        config="ovforge.builtin.loader:NativeOptions",
    )


@hookimpl
def ovforge_devices() -> Iterator[DeviceExtension]:
    """OpenVINO's devices."""
    for name, summary in (
        ("cpu", "The processor"),
        ("gpu", "An Intel GPU"),
        ("npu", "An Intel NPU"),
        ("auto", "OpenVINO chooses among the devices that are there"),
    ):
        yield DeviceExtension(
            name=name,
            summary=summary,
            factory=f"ovforge.builtin.device:{name.upper()}",
            config="ovforge.builtin.device:DeviceOptions",
        )
