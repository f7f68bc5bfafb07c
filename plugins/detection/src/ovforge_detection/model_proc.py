"""The loader of ready models with a description in Intel's model-proc format (DL Streamer)."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovforge import open_file
from ovforge.config import InputFile
from ovforge.contracts import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model import DetectorSpec, ModelBundle, Source, read_model, source_digest
from ovforge_detection.outputs import Description

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["ModelProcLoader", "ModelProcOptions", "parse_model_proc"]

LIMIT = 2**20
_MODELS = (".xml", ".onnx", ".pdmodel", ".tflite", ".pb")
_CONVERTERS = {
    "detection_output": "ssd", "tensor_to_bbox_ssd": "ssd", "boxes_labels": "boxes_labels",
    "tensor_to_bbox_atss": "boxes_labels", "tensor_to_bbox_yolo_v3": "yolo_v3", "yolo_v3": "yolo_v3",
    "tensor_to_bbox_yolo_v4": "yolo_v3", "yolo_v4": "yolo_v3", "tensor_to_bbox_yolo_v5": "yolo_v5",
    "yolo_v5": "yolo_v5", "yolo_v7": "yolo_v5", "tensor_to_bbox_yolo_v7": "yolo_v5", "yolo_v8": "yolo_v8",
    "tensor_to_bbox_yolo_v8": "yolo_v8",
}  # fmt: skip
_OTHER = frozenset({
    "attribute_name", "labels", "labels_file", "converter", "layer_name", "classes", "anchors", "masks",
    "iou_threshold", "confidence_threshold", "output_sigmoid_activation", "bbox_number_on_cell", "cells_number",
    "do_cls_softmax", "nms",
})  # fmt: skip
"""Keys of output_postproc that are understood; the numbers of cells and boxes are read from the outputs' shapes."""


class ModelProcOptions(BaseModel):
    """Which description belongs to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    proc: InputFile | None = Field(None, description="The model-proc .json; by default the one beside the model.")
    height: int | None = Field(None, gt=0, description="Height of the input, where the model leaves it open.")
    width: int | None = Field(None, gt=0, description="Width of the input, where the model leaves it open.")


class ModelProcLoader:
    """Opens a model that OpenVINO reads, as the role `detector`."""

    def __init__(self, options: ModelProcOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say maybe to a folder with a model and a model-proc beside it; a model alone is OpenVINO's own loader's."""
        return Match.MAYBE if _models(source) and _described(source) else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle. Raises ModelError where model and description do not fit, or one of them is missing."""
        models = _models(source)
        if len(models) != 1:
            raise ModelError(
                f"expected one model, found {', '.join(models) or 'none'}", where=source.name,
                hint=f"Name a file or folder with one of {', '.join(_MODELS)}.",
            )  # fmt: skip
        data, beside, where = self._proc(source)
        model = read_model(source, models[0])
        bundle = ModelBundle()
        spec = parse_model_proc(data, beside, where, _Input(model, self.options, source.name))
        bundle.models["detector"] = model
        bundle.configs["detector"] = spec.put({})
        bundle.identity["detector"] = source_digest(source)
        return bundle

    def _proc(self, source: Source) -> tuple[dict[str, Any], Source, str]:
        """Return the description, where files that it names lie, and what it is called in messages."""
        if self.options.proc is not None:
            beside = open_file(self.options.proc)
            path = next(iter(beside.files()))
            found = _json(beside, path)
            if found is None or "output_postproc" not in found:
                raise ModelError("it is no model-proc: output_postproc is missing", where=str(self.options.proc))
            return found, beside, str(self.options.proc)
        described = _described(source)
        if not described:
            raise ModelError(
                "no model-proc (.json with output_postproc) lies beside the model", where=source.name,
                hint="Name it with load.proc.",
            )  # fmt: skip
        if len(described) > 1:
            raise ConfigError(f"several model-procs: {', '.join(described)}", where="load.proc", hint="Name one.")
        path, found = next(iter(described.items()))
        return found, source, f"{source.name}: {path}"


class _Input:
    """The input of a model that takes pictures."""

    def __init__(self, model: ov.Model, options: ModelProcOptions, where: str) -> None:
        fitting = [port for port in model.inputs if port.get_partial_shape().rank.get_length() == 4]
        if len(fitting) != 1:
            raise ModelError(f"it has {len(fitting)} inputs of four dimensions, and one is the picture", where=where)
        shape = fitting[0].get_partial_shape()
        self.layout = "NHWC" if shape[3].is_static and shape[3].get_length() == 3 else "NCHW"
        places = (1, 2) if self.layout == "NHWC" else (2, 3)
        sides = []
        for place, key in zip(places, ("height", "width"), strict=True):
            own = shape[place].get_length() if shape[place].is_static else None
            asked = getattr(options, key)
            if own is None and asked is None:
                raise ConfigError(f"the model leaves the {key} of its input open", where=f"load.{key}", hint="Set it.")
            if own is not None and asked not in (None, own):
                raise ConfigError(f"the model's own is {own}", where=f"load.{key}", hint="Leave it out.")
            sides.append(own or asked)
        self.height, self.width = sides
        if not fitting[0].names:
            fitting[0].get_tensor().set_names({"image"})
        self.name = sorted(fitting[0].names)[0]
        for port in model.outputs:
            if not port.names:
                port.get_tensor().set_names({port.get_node().input_value(0).get_node().get_friendly_name()})


def parse_model_proc(data: dict[str, Any], beside: Source, where: str, given: _Input) -> DetectorSpec:
    """Return the spec of a detector that a model-proc describes. Raises ModelError for what is not understood."""
    processing = data.get("output_postproc")
    entries = [entry for entry in processing if isinstance(entry, dict)] if isinstance(processing, list) else []
    if not entries:
        raise ModelError("output_postproc is no list of descriptions", where=where)
    inputs = data.get("input_preproc") or [{}]
    params = inputs[0].get("params", {}) if isinstance(inputs[0], dict) else {}
    outputs = [_output(entry, where) for entry in entries]
    low, high = params.get("range", (0, 255))
    thresholds = [entry["confidence_threshold"] for entry in entries if "confidence_threshold" in entry]
    overlaps = [entry["iou_threshold"] for entry in entries if "iou_threshold" in entry]
    yolo = any(entry["converter"].startswith("yolo") for entry in outputs)
    try:
        return DetectorSpec(
            kind="described", height=given.height, width=given.width, layout=given.layout, input=given.name,
            keep_ratio=str(params.get("resize", "no")) == "aspect-ratio",
            fill=int(params.get("padding", {}).get("fill_value", [0])[0]) if "padding" in params else 0,
            colours=str(params.get("color_space", "BGR")).upper(),
            scale=(high - low) / 255,
            mean=[m - low for m in params.get("mean", (0, 0, 0))], std=params.get("std", (1, 1, 1)),
            threshold=thresholds[0] if thresholds else 0.5,
            nms=overlaps[0] if overlaps else 0.5 if yolo else None,
            labels=tuple(_labels(entries, beside, where)), outputs=tuple(outputs),
        )  # fmt: skip
    except (ValidationError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"its description cannot be used: {error}", where=where) from error


def _output(entry: dict[str, Any], where: str) -> dict[str, Any]:
    converter = str(entry.get("converter"))
    if converter not in _CONVERTERS:
        raise ModelError(
            f"the converter {converter!r} is not known", where=where, hint=f"Known: {', '.join(_CONVERTERS)}."
        )
    if unknown := sorted(set(entry) - _OTHER):
        raise ModelError(f"{unknown[0]!r} is not understood", where=f"{where}: output_postproc")
    layer = entry.get("layer_name")
    described = {
        "converter": _CONVERTERS[converter], "layer_name": None if layer in (None, "ANY") else layer,
        "classes": entry.get("classes"), "anchors": entry.get("anchors", ()), "masks": entry.get("masks", {}),
        "sigmoid": entry.get("output_sigmoid_activation", False),
    }  # fmt: skip
    try:
        return Description.model_validate(described).model_dump(mode="json", exclude_defaults=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from error


def _labels(entries: list[dict[str, Any]], beside: Source, where: str) -> list[str]:
    for entry in entries:
        if isinstance(labels := entry.get("labels"), list):
            return [str(label) for label in labels]
        if name := entry.get("labels_file"):
            path = PurePosixPath(str(name)).as_posix()
            if path not in beside.files():
                raise ModelError(f"{path} is missing, labels_file names it", where=where)
            return beside.read(path, LIMIT).decode("utf-8", "replace").splitlines()
    return []


def _models(source: Source) -> list[str]:
    return [path for path in source.files() if path.endswith(_MODELS)]


def _described(source: Source) -> dict[str, dict[str, Any]]:
    """Return the JSON files that are model-procs."""
    small = [path for path, size in source.files().items() if path.endswith(".json") and size <= LIMIT]
    found = {path: _json(source, path) for path in small}
    return {path: value for path, value in found.items() if value is not None and "output_postproc" in value}


def _json(source: Source, path: str) -> dict[str, Any] | None:
    try:
        value = json.loads(source.read(path, LIMIT))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
