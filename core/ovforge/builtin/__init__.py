"""What needs no other plugin: the formats that OpenVINO reads, its devices, and the program's own commands."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge.contracts.extensions import CommandExtension, DeviceExtension, LoaderExtension
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
            tunings="ovforge.builtin.device:processor_tunings" if name == "cpu" else ({"hint": "throughput"},),
        )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Pipelines, models, plugins, the cache."""
    for name, summary, factory in (
        ("run", "Run a pipeline and write its result", "pipelines:run"),
        ("plan", "Print what a run would do, and do nothing", "pipelines:plan"),
        ("convert", "Convert a model to an OpenVINO folder", "pipelines:convert"),
        ("schema", "Print the JSON Schema of configs, for editors", "pipelines:schema"),
        ("plugins", "Show what is installed and what it offers; switch it off and on; start a new one", "plugins:app"),
        ("clean", "Remove what killed runs left behind", "clean:clean"),
        ("cache", "Show and clear what is kept so that nothing is done twice", "cache:app"),
    ):
        yield CommandExtension(name=name, summary=summary, factory=f"ovforge.cli.{factory}")
