"""The loader of ready models with a description: a model-proc file of DL Streamer, or an IR's own `model_info`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovforge import open_file
from ovforge.config import InputFile
from ovforge.contracts import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle, Source, read_model, source_digest
from ovforge_detection.description import FILLED, ExtraInput, ModelProc, Picture, read_description, spec_of
from ovforge_detection.model_info import model_info, proc_of_info

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["ModelProcLoader", "ModelProcOptions"]

LIMIT = 2**20
"""Largest description or list of labels, in bytes."""

_MODELS = (".xml", ".onnx", ".pdmodel", ".tflite", ".pb")
_KNOWN = {"image_info": "image_info", "im_info": "image_info"} | {name: name for name in ("im_shape", "scale_factor")}
"""Names of inputs that say what they are filled with."""


class ModelProcOptions(BaseModel):
    """Which description belongs to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proc: InputFile | None = Field(
        None, description="The model-proc .json; by default the one beside the model, or what the model says of itself."
    )
    height: int | None = Field(None, gt=0, description="Height of the input, if the model leaves it open.")
    width: int | None = Field(None, gt=0, description="Width of the input, if the model leaves it open.")


class ModelProcLoader:
    """Opens a model that OpenVINO reads, as the role `detector`."""

    def __init__(self, options: ModelProcOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say maybe to a folder with a model and a model-proc beside it; a model alone is OpenVINO's own loader's."""
        return Match.MAYBE if _models(source) and _described(source) else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle. Raises ModelError if model and description do not fit, or one of them is missing."""
        models = _models(source)
        if len(models) != 1:
            raise ModelError(
                f"expected one model, found {', '.join(models) or 'none'}", where=source.name,
                hint=f"Name a file or folder with one of {', '.join(_MODELS)}.",
            )  # fmt: skip
        model = read_model(source, models[0])
        _name_ports(model)
        proc, labels = self._description(source, model)
        notes: list[str] = []
        if proc.image.by_multiple:
            _open_sides(model, proc, source.name, notes)
        picture, port = self._picture(model, proc, source.name, notes)
        inputs = _inputs(model, port, proc, source.name, notes)
        shapes = {name: _shape(output) for output in model.outputs for name in output.names}
        spec = spec_of(proc, picture, inputs, shapes, labels.read, notes)
        bundle = ModelBundle()
        bundle.models["detector"] = model
        bundle.configs["detector"] = spec.put({})
        bundle.identity["detector"] = source_digest(source)
        return bundle

    def _description(self, source: Source, model: ov.Model) -> tuple[ModelProc, _Labels]:
        """Return the description, and where files that it names lie. What a model-proc leaves out, the model says."""
        own = model_info(model)
        if self.options.proc is not None:
            where, labels = str(self.options.proc), _Labels(self.options.proc, None)
            beside = open_file(self.options.proc)
            data = _json(beside, next(iter(beside.files()), ""))
            if data is None or "output_postproc" not in data:
                raise ModelError("it is not a model-proc: output_postproc is missing", where=where)
        elif described := _described(source):
            if len(described) > 1:
                raise ConfigError(f"several model-procs: {', '.join(described)}", where="load.proc", hint="Name one.")
            path, data = next(iter(described.items()))
            where, labels = f"{source.name}: {path}", _Labels(PurePosixPath(path), source)
        elif own:
            where, labels = f"{source.name}: model_info", _Labels(PurePosixPath("."), source)
            return read_description(proc_of_info(own, _metadata(source), where), where), labels
        else:
            raise ModelError(
                "nothing says how its input and outputs are used", where=source.name,
                hint="Name a model-proc (a .json): `ovforge detect --model-proc FILE`, or load.proc.",
            )  # fmt: skip
        if own and not data["output_postproc"]:
            data = {**data, "output_postproc": proc_of_info(own, _metadata(source), where)["output_postproc"]}
        return read_description(data, where), labels

    def _picture(self, model: ov.Model, proc: ModelProc, where: str, notes: list[str]) -> tuple[Picture, ov.Output]:
        port = _picture_port(model, proc, where, notes)
        shape = port.get_partial_shape()
        layout = _layout(port)
        channel, *sides = (3, 1, 2) if layout == "NHWC" else (1, 2, 3)
        channels = _length(shape[channel])
        if channels == -1:
            channels = 1 if proc.image.color_space == "GRAYSCALE" else 3
        if channels not in (1, 3, 4):
            raise ModelError(f"its input has {channels} channels; pictures have 1, 3 or 4", where=where)
        size = []
        for place, key, described in zip(
            sides, ("height", "width"), proc.image.reshape_size or (None, None), strict=True
        ):
            own, asked = _length(shape[place]), getattr(self.options, key)
            if own == -1 and asked is None and described is None:
                raise ConfigError(
                    f"the model leaves the {key} of its input open", where=f"load.{key}",
                    hint="Set load.height and load.width; `ovforge detect --size HEIGHTxWIDTH` does both.",
                )  # fmt: skip
            wanted = asked or described or own
            if own not in (-1, wanted) and not _reshaped(model, port, {0: -1, place: wanted}):
                spot = f"load.{key}" if asked else f"{proc.where}: input_preproc: reshape_size"
                raise ConfigError(
                    f"the model's own {key} is {own}, and it takes no other", where=spot, hint="Leave it out."
                )
            size.append(int(wanted))
        if _length(shape[0]) > 1:  # exported for a batch of several pictures; the task says how many run at once
            _reshaped(model, port, {0: -1})
        return Picture(sorted(port.names)[0], layout, channels, *size), port


class _Labels:
    """Files of labels, a line each, that a description names: beside it, or below."""

    def __init__(self, proc: Path | PurePosixPath, source: Source | None) -> None:
        self._proc, self._source = proc, source

    def read(self, path: str) -> Sequence[str]:
        """Return the lines of a file. Raises ModelError if it is missing, elsewhere or not text."""
        inside = PurePosixPath(path)
        where = f"{self._proc}: labels"
        if inside.is_absolute() or ".." in inside.parts:
            raise ModelError(f"{path} lies elsewhere", where=where, hint="Put it beside the model-proc.")
        if self._source is None:
            file = Path(self._proc).parent / inside
            if not file.is_file() or not file.resolve().is_relative_to(file.parent.resolve()):
                raise ModelError(f"{path} is missing", where=where, hint="Put it beside the model-proc.")
            source, name = open_file(file), file.name
        else:
            source, name = self._source, (PurePosixPath(self._proc).parent / inside).as_posix()
            if name not in source.files():
                raise ModelError(f"{path} is missing", where=where, hint="Put it beside the model-proc.")
        try:
            return source.read(name, LIMIT).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not text in UTF-8: {error}", where=where) from error


# -- inputs -----------------------------------------------------------------------------------------------------------


def _name_ports(model: ov.Model) -> None:
    """Give ports without a name that of their node."""
    for place, port in enumerate(model.inputs):
        if not port.names:
            port.get_tensor().set_names({port.get_node().get_friendly_name() or f"input_{place}"})
    for port in model.outputs:
        if not port.names:
            port.get_tensor().set_names({port.get_node().input_value(0).get_node().get_friendly_name()})


def _open_sides(model: ov.Model, proc: ModelProc, where: str, notes: list[str]) -> None:
    """Let the input take pictures of any size. Raises ModelError for a model that is made for one."""
    port = _picture_port(model, proc, where, [])
    first = 1 if _layout(port) == "NHWC" else 2
    if not _reshaped(model, port, {first: -1, first + 1: -1}):
        raise ModelError(
            "its description asks for an input of any size, and it has one", where=where,
            hint=f"Export it with an open height and width, or take another resize than {proc.image.resize}.",
        )  # fmt: skip


def _reshaped(model: ov.Model, port: ov.Output, sides: Mapping[int, int]) -> bool:
    """Give sides of an input another length, -1 for any. Say whether the model's operations allow it."""
    import openvino as ov

    shape = port.get_partial_shape()
    for place, length in sides.items():
        shape[place] = ov.Dimension(length)
    try:
        model.reshape({port: shape})
    except RuntimeError:
        return False
    return True


def _picture_port(model: ov.Model, proc: ModelProc, where: str, notes: list[str]) -> ov.Output:
    """Return the input that takes pictures: the one that the description names, or the only one of four dimensions."""
    named = [port for port in model.inputs if proc.image_layer in port.names]
    others = {each.layer_name for each in proc.inputs if each.format != "image"}
    fitting = named or [port for port in model.inputs if len(_shape(port)) == 4 and not others & port.names]
    if len(fitting) != 1 or len(_shape(fitting[0])) != 4:
        listed = ", ".join(f"{sorted(port.names)[0]} {_shape(port)}" for port in model.inputs)
        raise ModelError(
            "which of its inputs takes pictures is not clear", where=where,
            hint=f'Name one of four dimensions in input_preproc: "format": "image", "layer_name"; it has {listed}.',
        )  # fmt: skip
    if proc.image_layer not in (None, "ANY") and not named:
        notes.append(f"the model has no input {proc.image_layer!r}; pictures go to {sorted(fitting[0].names)[0]!r}")
    return fitting[0]


def _inputs(model: ov.Model, picture: ov.Output, proc: ModelProc, where: str, notes: list[str]) -> list[ExtraInput]:
    """Return what the inputs beside the picture are filled with. Raises ModelError for one that nothing fills."""
    entries = [each for each in proc.inputs if each.format != "image"]
    rest = [port for port in model.inputs if port.node.get_friendly_name() != picture.node.get_friendly_name()]
    found = []
    for port in rest:
        entry = next((each for each in entries if each.layer_name in port.names), None)
        if entry is None and len(rest) == len(entries) == 1 and entries[0].layer_name is None:
            entry = entries[0]
        content = entry.format if entry else next((_KNOWN[name] for name in sorted(port.names) if name in _KNOWN), None)
        name = sorted(port.names)[0]
        if content is None:
            raise ModelError(
                f"nothing fills its input {name!r}", where=where,
                hint=f'Describe it in input_preproc: "layer_name": "{name}", "format": one of {", ".join(FILLED)}.',
            )  # fmt: skip
        scale = float(entry.params.get("scale", 1.0)) if entry else 1.0
        found.append(ExtraInput(name=name, content=content, shape=_filled_shape(port, content, where), scale=scale))
    known = {name for port in model.inputs for name in port.names}
    for entry in entries:
        if entry.layer_name is not None and entry.layer_name not in known:
            notes.append(f"the model has no input {entry.layer_name!r}, which input_preproc describes")
    return found


def _filled_shape(port: ov.Output, content: str, where: str) -> tuple[int, ...]:
    """Return the fixed shape of an input beside the picture: one picture, and as many values as its content has."""
    values = {"image_info": 3, "im_shape": 2, "scale_factor": 2}.get(content, 1)
    sides = _shape(port)
    last = len(sides) - 1
    shape = [side if side != -1 else values if place == last else 1 for place, side in enumerate(sides)]
    if content != "sequence_index" and (len(shape) > 2 or shape[-1] < 2 or (len(shape) == 2 and shape[0] != 1)):
        raise ModelError(f"its input {sorted(port.names)[0]!r} of {shape} cannot hold {content}", where=where)
    return tuple(shape)


def _layout(port: ov.Output) -> Literal["NCHW", "NHWC"]:
    """Return an input's layout: its own, or what its shape shows; up to four channels, before or after the sides."""
    own = str(port.node.layout).strip("[]").replace(",", "")
    if own in ("NCHW", "NHWC"):
        return "NHWC" if own == "NHWC" else "NCHW"
    _, first, _, last = _shape(port)
    return "NHWC" if 1 <= last <= 4 and not 1 <= first <= 4 else "NCHW"


def _shape(port: ov.Output) -> list[int]:
    """Return a port's shape, -1 for what is open; [] for any rank."""
    shape = port.get_partial_shape()
    return [_length(side) for side in shape] if shape.rank.is_static else []


def _length(side: ov.Dimension) -> int:
    return int(side.get_length()) if side.is_static else -1


# -- files ------------------------------------------------------------------------------------------------------------


def _models(source: Source) -> list[str]:
    return [path for path in source.files() if path.endswith(_MODELS)]


def _described(source: Source) -> dict[str, dict[str, Any]]:
    """Return the JSON files that are model-procs."""
    small = [path for path, size in source.files().items() if path.endswith(".json") and size <= LIMIT]
    found = {path: _json(source, path) for path in small}
    return {path: value for path, value in found.items() if value is not None and "output_postproc" in value}


def _metadata(source: Source) -> str:
    """Return Ultralytics' metadata.yaml beside a model, "" if there is none."""
    files = source.files()
    if "metadata.yaml" in files and files["metadata.yaml"] <= LIMIT:
        return source.read("metadata.yaml", LIMIT).decode("utf-8", "replace")
    return ""


def _json(source: Source, path: str) -> dict[str, Any] | None:
    try:
        value = json.loads(source.read(path, LIMIT))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
