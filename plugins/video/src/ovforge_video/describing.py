"""A second model that looks at each thing, every so many frames: classes, numbers, embeddings.

Source: the model-proc files of DL Streamer's gvaclassify, with its converters `label`, `text` and `raw_data_copy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.preprocess import ColorFormat, PrePostProcessor, ResizeAlgorithm
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

import ovforge
from ovforge.config import checked
from ovforge.errors import ConfigError, ModelError
from ovforge.model import OPENVINO_ERRORS, core, reason_of
from ovforge.store import parse_object
from ovforge_video.frame import Frame
from ovforge_video.options import SecondModelOptions

__all__ = ["Describer", "Memory", "part_of"]

LIMIT = 2**20
"""Largest description, in bytes."""
FORGOTTEN = 60.0
"""Seconds after which what is known of a thing that is not seen goes."""
Detail = dict[str, Any]


Side = Annotated[int, Field(ge=1, le=8192)]


class _Params(BaseModel):
    """How a picture becomes the model's input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: Literal["no", "no-aspect-ratio"] = "no-aspect-ratio"
    color_space: Literal["RGB", "BGR"] = "BGR"
    reshape_size: tuple[Side, Side] | None = None
    """Height and width of an input that takes any."""
    range: tuple[float, float] = (0.0, 255.0)
    mean: list[float] = Field([0.0], min_length=1, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1, max_length=3)


class _Preparation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_name: str | None = None
    format: Literal["image"] = "image"
    precision: Literal["U8", "FP32", "FP16"] = "U8"
    params: _Params = _Params()


class _Output(BaseModel):
    """What one output means."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    layer_name: str | None = None
    attribute_name: str | None = Field(None, max_length=100)
    converter: Literal["label", "tensor_to_label", "text", "tensor_to_text", "raw_data_copy"] = "raw_data_copy"
    method: Literal["max", "softmax", "index", "compound"] = "max"
    labels: list[str] = Field([], max_length=100_000)
    threshold: float = Field(0.5, validation_alias=AliasChoices("threshold", "compound_threshold"))
    scale: float = Field(1.0, validation_alias=AliasChoices("scale", "text_scale", "tensor_to_text_scale"))
    precision: int = Field(
        2, ge=0, le=9,
        validation_alias=AliasChoices("precision", "text_precision", "tensor_to_text_precision"),
    )  # fmt: skip


class _Description(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    json_schema_version: str = "2.2.0"
    input_preproc: list[_Preparation] = Field([], max_length=1)
    output_postproc: list[_Output] = Field(min_length=1, max_length=100)


class Describer:
    """A compiled model and what its outputs mean; several threads may use it, each through a `Memory` of its own."""

    def __init__(self, options: SecondModelOptions, where: str) -> None:
        self.options = options
        path = options.model
        proc = options.proc or path.with_suffix(".json")
        self._outputs: list[tuple[int, str, _Output]] = []
        description = _read(proc)
        models = ovforge.open_model(path, use="openvino", cache=None).models
        if len(models) != 1:
            raise ConfigError(f"it holds {len(models)} models", where=f"{where}.model", hint="Name one model's file.")
        (model,) = models.values()
        try:
            prepared = _prepared(model, description, path.name)
            hints = {"PERFORMANCE_HINT": "THROUGHPUT"}
            if options.device.startswith("CPU"):
                # In bfloat16 OpenVINO 2026.4 makes NaN of some convolutions behind an input of open size.
                hints["INFERENCE_PRECISION_HINT"] = "f32"
            self._model: ov.CompiledModel = core().compile_model(prepared, options.device, hints)
        except OPENVINO_ERRORS as error:
            raise ModelError(f"it cannot be compiled: {reason_of(error)}", where=str(path)) from error
        for place, output in enumerate(description.output_postproc):
            self._outputs.append((self._port(output, place, path.name), self._name(output, path), output))

    @property
    def embeddings(self) -> list[str]:
        """The names of the outputs that are given as they are."""
        return [name for _, name, output in self._outputs if output.converter == "raw_data_copy"]

    def request(self) -> ov.InferRequest:
        """Return a request for one thread."""
        return self._model.create_infer_request()

    def describe(self, request: ov.InferRequest, picture: NDArray[np.uint8]) -> dict[str, Detail]:
        """Return what a picture, RGB (height, width, 3), shows, by the names of attributes."""
        request.infer([np.ascontiguousarray(picture)[None]])
        return {
            name: _read_output(np.asarray(request.get_output_tensor(port).data, np.float64).reshape(-1), output)
            for port, name, output in self._outputs
        }

    def _port(self, output: _Output, place: int, where: str) -> int:
        ports = self._model.outputs
        if output.layer_name is None and place < len(ports):
            found = [place]
        else:
            found = [n for n, port in enumerate(ports) if output.layer_name in port.get_names()]
            found = found or [
                n for n, port in enumerate(ports) if output.layer_name == port.get_node().get_friendly_name()
            ]
        if not found:
            names = ", ".join(sorted(name for port in ports for name in port.get_names()))
            raise ModelError(f"it has no output {output.layer_name!r}", where=where, hint=f"It has: {names}.")
        if output.converter.endswith("label") and not output.labels:
            raise ModelError(
                "an output's labels are missing", where=where, hint='Write "labels": [...] in the model-proc.'
            )
        return found[0]

    def _name(self, output: _Output, path: Path) -> str:
        name = output.attribute_name or output.layer_name or path.stem
        if any(name == other for _, other, _ in self._outputs):
            raise ModelError(f"two outputs are called {name!r}", where=path.name, hint="Name them by attribute_name.")
        return name


@dataclass
class _Known:
    frame: int
    seen: float
    details: dict[str, Detail] = field(default_factory=dict)


class Memory:
    """What is known of the things of one stream, by several models; for one thread."""

    def __init__(self, describers: Sequence[Describer]) -> None:
        self._describers = [(describer, describer.request()) for describer in describers]
        self._known: list[dict[int, _Known]] = [{} for _ in describers]

    def __call__(self, frame: Frame) -> tuple[Mapping[str, Detail], ...]:
        """Return what is known of each thing of a frame, with its picture; models look at those whose turn it is.

        Things without a number are looked at in each frame.
        """
        details: list[dict[str, Detail]] = [{} for _ in range(len(frame))]
        for (describer, request), known in zip(self._describers, self._known, strict=True):
            for n, (number, label) in enumerate(zip(frame.ids.tolist(), frame.labels, strict=True)):
                if describer.options.labels and label not in describer.options.labels:
                    continue
                old = known.get(number) if number else None
                due = old is None or frame.number - old.frame >= describer.options.every
                part = _part(frame, n) if due and frame.found[n] else None
                if part is not None:
                    old = _Known(frame.number, frame.seconds, describer.describe(request, part))
                if old is not None:
                    old.seen = frame.seconds
                    details[n] |= old.details
                    if number:
                        known[number] = old
            for number in [number for number, each in known.items() if frame.seconds - each.seen > FORGOTTEN]:
                del known[number]
        return tuple(details)


def _part(frame: Frame, n: int) -> NDArray[np.uint8] | None:
    assert frame.picture is not None
    return part_of(frame.picture, frame.boxes[n])


def part_of(picture: NDArray[np.uint8], box: NDArray[np.floating]) -> NDArray[np.uint8] | None:
    """Return the part of a picture, RGB (height, width, 3), that a box (4,) holds; None if that is not a pixel."""
    left, top, right, bottom = np.maximum(np.round(box), 0).astype(int).tolist()
    part = picture[top:bottom, left:right]
    return part if part.size else None


def _read(path: Path) -> _Description:
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            "nothing says what the model's outputs mean", where=str(path),
            hint="Write a model-proc, as for DL Streamer's gvaclassify, beside the model, or name it by `proc`.",
        ) from error  # fmt: skip
    except OSError as error:
        raise ModelError(f"it cannot be read: {error.strerror}", where=str(path), hint="It is a JSON file.") from error
    return checked(_Description, parse_object(data, str(path), size=LIMIT), where=str(path))


def _prepared(model: ov.Model, description: _Description, where: str) -> ov.Model:
    """Return the model with an input for pictures of any size, uint8 (1, height, width, 3), RGB."""
    how = (description.input_preproc or [_Preparation()])[0]
    if len(model.inputs) != 1 or len(model.input().get_partial_shape()) != 4:
        raise ModelError(
            "it does not take one picture", where=where, hint="Classifiers take one input of four dimensions."
        )
    shape = list(model.input().get_partial_shape())
    last = shape[3].is_static and shape[3].get_length() == 3
    height, width = (1, 2) if last else (2, 3)
    for side, asked in zip((height, width), how.params.reshape_size or (None, None), strict=True):
        if shape[side].is_dynamic and asked is None:
            raise ModelError(
                "its input's height and width are open",
                where=where,
                hint="Add reshape_size to the params of its model-proc.",
            )
        if asked is not None:
            shape[side] = ov.Dimension(asked)
    model.reshape({0: ov.PartialShape([1, *(3 if side.is_dynamic else side for side in shape[1:])])})
    low, high = how.params.range
    processor = PrePostProcessor(model)
    entry = processor.input()
    entry.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC")).set_spatial_dynamic_shape()
    entry.tensor().set_color_format(ColorFormat.RGB)
    entry.model().set_layout(ov.Layout("NHWC" if last else "NCHW"))
    steps = entry.preprocess().convert_element_type(ov.Type.f32)
    if how.params.color_space == "BGR":
        steps = steps.convert_color(ColorFormat.BGR)
    steps = steps.resize(ResizeAlgorithm.RESIZE_LINEAR)
    steps = steps.scale(255.0 / (high - low)).mean(-low) if high != low else steps
    steps.mean(how.params.mean * (3 if len(how.params.mean) == 1 else 1)).scale(
        how.params.std * (3 if len(how.params.std) == 1 else 1)
    )
    return processor.build()


def _read_output(values: NDArray[np.float64], output: _Output) -> Detail:
    """Return what an output says."""
    if output.converter == "raw_data_copy":
        return {"data": [round(value, 6) for value in values.tolist()]}
    if output.converter.endswith("text"):
        number = round(float(values[0]) * output.scale, output.precision)
        return {"label": f"{number:.{output.precision}f}", "value": number}
    labels = output.labels
    if output.method == "index":
        return {"label": _label(labels, round(float(values[0])))}
    if output.method == "compound":
        sure = [n for n, value in enumerate(values) if value >= output.threshold]
        return {
            "label": ", ".join(_label(labels, n) for n in sure),
            "score": round(float(values[sure].min()), 4) if sure else 0.0,
        }
    if output.method == "softmax":
        values = np.exp(values - values.max())
        values /= values.sum()
    best = int(values.argmax())
    return {"label": _label(labels, best), "score": round(float(values[best]), 4)}


def _label(labels: Sequence[str], n: int) -> str:
    return labels[n] if 0 <= n < len(labels) else f"class {n}"
