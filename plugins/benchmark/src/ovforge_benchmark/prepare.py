"""From benchmark_app's flags to a compiled model and what it is fed with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino as ov
from openvino.preprocess import PrePostProcessor

from ovforge.errors import ConfigError, DeviceError, InputError, ModelError
from ovforge.model import OPENVINO_ERRORS, FileSource, check_model_file, core, reason_of
from ovforge_benchmark import settings
from ovforge_benchmark.feeds import Feed, make_feeds
from ovforge_benchmark.flags import PIPELINES_ONLY, TYPES, refuse
from ovforge_benchmark.operators import Counter
from ovforge_benchmark.shapes import Input, describe_inputs, element_type

__all__ = ["Prepared", "Tell", "prepare"]

Tell = Callable[[str, dict[str, Any]], None]
"""Called with an event and its facts: "step" with a name; "running" with iterations, seconds, throughput."""


@dataclass
class Prepared:
    """A compiled model and what it will be fed with."""

    flags: Mapping[str, Any]
    name: str
    api: str
    compiled: ov.CompiledModel
    inputs: list[Input]
    properties: dict[str, Any]
    start: dict[str, float]
    remarks: list[str]
    feeds: list[Feed] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    counted: list[list[Counter]] = field(default_factory=list)
    """Layers of each request's last inference, where they are counted."""


def prepare(flags: Mapping[str, Any], tell: Tell = lambda *_: None) -> Prepared:
    """Read and compile the model that the flags name, and make its inputs. Raises an OvforgeError for what is wrong."""
    refuse(flags, PIPELINES_ONLY, "only for pipelines")
    for library in (flags["extensions"] or "").split(",") if flags["extensions"] else ():
        try:
            core().add_extension(library)
        except OPENVINO_ERRORS as error:
            raise InputError(
                f"is not a library of operations: {reason_of(error)}", where=f"-extensions {library}"
            ) from error
    api = settings.api_of(flags)
    properties, remarks = settings.wanted(core(), flags, api)
    start: dict[str, float] = {}
    name = flags["model"]
    tell("step", {"step": "read"})
    if Path(name).suffix == ".blob" or flags["load_from_file"]:
        compiled, inputs = _compile_file(flags, properties, start)
    else:
        model = _timed(start, "read", lambda: _read(flags))
        _name_ports(model)
        inputs, reshape = describe_inputs(model.inputs, flags)
        if reshape:
            _timed(start, "reshape", lambda: _reshape(model, inputs))
        model = _preprocess(model, inputs, flags)
        tell("step", {"step": "compile"})
        compiled = _timed(start, "compile", lambda: _compile(model, flags["target_device"], properties))
    prepared = Prepared(flags, name, api, compiled, inputs, properties, start, remarks)
    if flags["number_iterations"] == 0:
        prepared.filled = dict.fromkeys((one.name for one in inputs), "nothing")
    else:
        prepared.feeds, prepared.filled = make_feeds(
            inputs, [text for texts in flags["paths_to_input"] for text in texts]
        )
    return prepared


def _timed(start: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    value = work()
    start[name] = time.perf_counter() - began
    return value


def _read(flags: Mapping[str, Any]) -> ov.Model:
    """Return the model from whatever any loader here opens."""
    import ovforge

    key = None
    if flags["key"]:
        kind, colon, place = flags["key"].partition(":")
        if not colon or not kind.isalpha():
            raise ConfigError("names no place of a key", where="--key", hint="Write env:NAME or file:PATH.")
        key = {kind: place}
    bundle = ovforge.open_model(flags["model"], key=key)
    roles = list(bundle.models)
    role: str | None = flags["role"] or (roles[0] if len(roles) == 1 else None)
    if role is None or role not in bundle.models:
        raise InputError(
            f"it has no role {role!r}" if role else f"it has {len(roles)} models: {', '.join(roles)}",
            where=flags["model"],
            hint=f"Add --role with one of {', '.join(roles)}; or measure a pipeline: name its config.",
        )
    return bundle.models[role]


def _name_ports(model: ov.Model) -> None:
    for port in model.inputs:
        if not port.names:
            port.set_names({port.node.get_friendly_name()})


def _reshape(model: ov.Model, inputs: Sequence[Input]) -> None:
    try:
        model.reshape({one.name: one.shape for one in inputs})
    except OPENVINO_ERRORS as error:
        wanted = ", ".join(f"{one.name}{one.shape}" for one in inputs)
        raise InputError(
            f"the model cannot have the shapes {wanted}: {reason_of(error)}", where="-shape, -b"
        ) from error


def _preprocess(model: ov.Model, inputs: Sequence[Input], flags: Mapping[str, Any]) -> ov.Model:
    """Set types of inputs and outputs, means and scales; pictures of a known size are fed as u8 unless asked for."""
    steps = PrePostProcessor(model)
    by_name = _types_by_name(model, flags["input_output_precision"])
    for number, one in enumerate(inputs):
        asked = by_name.get(("input", number)) or flags["input_precision"]
        if asked or (one.is_image and one.sides_known):
            one.type = element_type(asked or "u8")
            steps.input(number).tensor().set_element_type(one.type)
        if one.mean or one.scale:
            step = steps.input(number).preprocess().convert_element_type(ov.Type.f32)
            if one.mean:
                step.mean(one.mean)
            if one.scale:
                step.scale(one.scale)
        if one.layout != ov.Layout():
            steps.input(number).model().set_layout(one.layout)
    for number in range(len(model.outputs)):
        if asked := by_name.get(("output", number)) or flags["output_precision"]:
            steps.output(number).tensor().set_element_type(element_type(asked))
    try:
        return steps.build()
    except OPENVINO_ERRORS as error:
        raise InputError(
            f"does not fit the model: {reason_of(error)}", where="-ip, -op, -iop, -layout, -mean_values"
        ) from error


def _types_by_name(model: ov.Model, text: str | None) -> dict[tuple[str, int], str]:
    """Read -iop: NAME:TYPE,NAME:TYPE; a name may hold a colon."""
    known: dict[str, tuple[str, int]] = {}
    for kind, ports in (("output", model.outputs), ("input", model.inputs)):
        for number, port in enumerate(ports):
            known |= dict.fromkeys({*port.names, port.node.get_friendly_name()}, (kind, number))
    found: dict[tuple[str, int], str] = {}
    for part in (text or "").replace(" ", "").split(",") if text else ():
        name, _, asked = part.rpartition(":")
        if name not in known or asked not in TYPES:
            raise InputError(
                f"{part!r} is not NAME:TYPE",
                where="-iop",
                hint=f"Names: {', '.join(known)}. Types: {', '.join(TYPES)}.",
            )
        found[known[name]] = asked
    return found


def _compile(model: ov.Model | str, device: str, properties: Mapping[str, Any]) -> ov.CompiledModel:
    try:
        return core().compile_model(model, device, dict(properties))
    except OPENVINO_ERRORS as error:
        raise DeviceError(
            f"the model does not compile: {reason_of(error)}",
            where=f"-d {device}",
            hint="Try -d CPU -infer_precision f32, to tell the model from the device and the settings.",
        ) from error


def _compile_file(
    flags: Mapping[str, Any], properties: Mapping[str, Any], start: dict[str, float]
) -> tuple[ov.CompiledModel, list[Input]]:
    """Compile a file without reading it first, or read a compiled model (.blob): its inputs are as they are."""
    path = Path(flags["model"])
    changes = [name for name in ("shape", "batch_size", "input_precision", "output_precision", "input_output_precision",
               "mean_values", "scale_values") if flags[name]]  # fmt: skip
    if changes:
        raise InputError(f"{', '.join(changes)} changes a model, and this one is not read", where=str(path))
    if not path.is_file():
        raise ModelError("no such file", where=str(path))
    if path.suffix == ".blob":

        def read() -> ov.CompiledModel:
            try:
                return core().import_model(path.read_bytes(), flags["target_device"], dict(properties))
            except (*OPENVINO_ERRORS, TypeError) as error:
                raise ModelError(
                    f"is not a model compiled for {flags['target_device']} by this version", where=str(path)
                ) from error

        compiled = _timed(start, "import", read)
    else:
        check_model_file(FileSource(path), path.name)
        compiled = _timed(start, "compile", lambda: _compile(str(path), flags["target_device"], properties))
    inputs, _ = describe_inputs(compiled.inputs, flags)
    return compiled, inputs
