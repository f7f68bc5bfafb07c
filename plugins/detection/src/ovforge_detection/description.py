"""The model-proc format of DL Streamer: what a file may say, and what it means for pictures and outputs.

Source: its `model_proc_schema.h`, `pre_processor_info_parser.cpp` and `inference_impl.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ovforge.config import checked
from ovforge.errors import ConfigError, ModelError, did_you_mean
from ovforge.model import DetectorSpec
from ovforge_detection.outputs import Description

__all__ = ["FILLED", "ExtraInput", "ModelProc", "Picture", "read_description", "spec_of"]

FILLED = ("image_info", "sequence_index", "im_shape", "scale_factor")
"""What inputs beside the picture can be filled with; the last two are PaddlePaddle's."""

_CONVERTERS = {
    "detection_output": "detection_output", "tensor_to_bbox_ssd": "detection_output", "boxes_labels": "boxes_labels",
    "tensor_to_bbox_atss": "boxes_labels", "ssd": "boxes_labels", "boxes_scores": "boxes_scores", "boxes": "boxes",
    "yolo_v2": "yolo_v2", "tensor_to_bbox_yolo_v2": "yolo_v2", "yolo_v3": "yolo_v3",
    "tensor_to_bbox_yolo_v3": "yolo_v3", "yolo_v4": "yolo_v3", "tensor_to_bbox_yolo_v4": "yolo_v3",
    "yolo_v5": "yolo_v5", "tensor_to_bbox_yolo_v5": "yolo_v5", "yolo_v7": "yolo_v7",
    "tensor_to_bbox_yolo_v7": "yolo_v7", "yolo_v8": "yolo_v8", "tensor_to_bbox_yolo_v8": "yolo_v8",
    "YOLOv8": "yolo_v8", "yolo_v11": "yolo_v8", "yolo_v10": "yolo_v10", "yolo_v26": "yolo_v10", "yolo_x": "yolo_x",
    "yolo_v8_obb": "yolo_v8_obb", "YOLOv8-OBB": "yolo_v8_obb", "yolo_v11_obb": "yolo_v8_obb",
    "yolo_v26_obb": "yolo_v26_obb", "yolo_v8_pose": "yolo_v8_pose", "yolo_v11_pose": "yolo_v8_pose",
    "yolo_v26_pose": "yolo_v10", "yolo_v8_seg": "yolo_v8_seg", "YOLOv8-SEG": "yolo_v8_seg",
    "yolo_v11_seg": "yolo_v8_seg", "yolo_v26_seg": "yolo_v10", "rfdetr_seg": "rfdetr", "centerface": "centerface",
    "heatmap_boxes": "heatmap_boxes", "rotated_detection": "mask_rcnn",
    "mask_rcnn": "mask_rcnn", "tensor_to_bbox_mask_rcnn": "mask_rcnn", "MaskRCNN": "mask_rcnn", "rtdetr": "rtdetr",
    "rfdetr": "rfdetr", "detection": "detection", "paddle_detection": "paddle_detection",
    "gfl": "gfl", "nanodet": "gfl", "centernet": "yolo_v10",
}  # fmt: skip
"""Names of converters, old ones among them -> ours."""

_NMS = {
    "yolo_v2": 0.5, "yolo_v3": 0.5, "yolo_v5": 0.5, "yolo_v7": 0.4, "yolo_v8": 0.4, "yolo_v10": 0.4, "yolo_x": 0.4,
    "boxes_labels": 0.4, "boxes_scores": 0.4, "boxes": 0.4, "mask_rcnn": 0.4, "yolo_v8_obb": 0.4, "yolo_v8_pose": 0.4,
    "yolo_v8_seg": 0.4, "yolo_v26_obb": 0.4, "centerface": 0.4, "gfl": 0.6,
}  # fmt: skip
"""Converter -> the overlap above which a box goes, if the file names none; others keep all boxes."""

_UNREAD = {
    "obb": "angles", "rotated_detection": "angles", "pose": "points", "seg": "masks", "mask_rcnn": "masks",
    "maskrcnn": "masks", "centerface": "landmarks",
}  # fmt: skip
"""The end of a converter's name -> what of a model's outputs is not a box."""

_MULTIPLE = ("aspect-ratio-multiple-of", "aspect-ratio-multiple")
_RESIZE = {
    "no-aspect-ratio": "stretch", "aspect-ratio": "fit", "aspect-ratio-pad": "fit",
    **dict.fromkeys(_MULTIPLE, "multiple"),
}  # fmt: skip

Model = TypeVar("Model", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Padding(_Part):
    """Pixels at the edges of the input that stay empty, and what fills them."""

    stride: int | None = Field(None, ge=0)
    stride_x: int | None = Field(None, ge=0)
    stride_y: int | None = Field(None, ge=0)
    fill_value: tuple[float, ...] = (0.0,)

    @model_validator(mode="after")
    def _one_way(self) -> Padding:
        if self.stride is not None and not (self.stride_x is self.stride_y is None):
            raise ValueError("give stride, or stride_x and stride_y")
        return self

    @property
    def margin(self) -> tuple[int, int]:
        """Left and right, above and below."""
        return self.stride_x or self.stride or 0, self.stride_y or self.stride or 0


class ImageParams(_Part):
    """How pictures become an input."""

    resize: Literal[
        "no", "no-aspect-ratio", "aspect-ratio", "aspect-ratio-pad", "aspect-ratio-multiple-of", "aspect-ratio-multiple"
    ] = "no"
    crop: Literal["central", "central-resize", "top_left", "top_right", "bottom_left", "bottom_right"] | None = None
    color_space: Literal["RGB", "BGR", "GRAYSCALE"] | None = None
    range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = Field(None, min_length=1)
    std: tuple[float, ...] | None = Field(None, min_length=1)
    scale: float | None = Field(None, description="What pixels are divided by.")
    padding: Padding | None = None
    reshape_size: tuple[int, int] | None = Field(None, description="Height and width of an input that takes any.")
    resize_multiple: int = Field(1, gt=0, alias="resize-multiple", description="What sides are multiples of.")

    @model_validator(mode="after")
    def _together(self) -> ImageParams:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.scale == 0 or 0 in (self.std or ()):
            raise ValueError("scale and std divide, and cannot be 0")
        if self.by_multiple and (self.reshape_size is None or min(self.reshape_size) < 1):
            raise ValueError(f"{self.resize} needs reshape_size, a height and a width")
        if self.by_multiple and (self.crop or self.padding):
            raise ValueError(f"{self.resize} goes without crop and padding")
        return self

    @property
    def by_multiple(self) -> bool:
        """Whether each picture gives the input its size."""
        return self.resize in _MULTIPLE


class InfoParams(_Part):
    """What an input beside the picture is filled with."""

    scale: float = 1.0


class Preprocessing(_Part):
    """An entry of input_preproc."""

    layer_name: str | None = None
    format: Literal["image", "image_info", "sequence_index", "im_shape", "scale_factor"] = "image"
    precision: Literal["U8", "FP32"] | None = None
    params: dict[str, Any] = Field(default_factory=dict)


class Postprocessing(_Part):
    """An entry of output_postproc. `attribute_name` and `format` name things in DL Streamer's metadata alone."""

    converter: str | None = None
    layer_name: str | None = None
    layer_names: tuple[str, ...] = ()
    attribute_name: str | None = None
    format: str | None = None
    labels: tuple[str, ...] | str | None = None
    labels_file: str | None = None
    classes: int | None = Field(None, gt=0)
    anchors: tuple[float, ...] = ()
    masks: tuple[int, ...] | dict[int, tuple[int, ...]] = ()
    bbox_number_on_cell: int | None = Field(None, gt=0)
    cells_number: int | None = Field(None, gt=0)
    cells_number_x: int | None = Field(None, gt=0)
    cells_number_y: int | None = Field(None, gt=0)
    output_sigmoid_activation: bool = False
    do_cls_softmax: bool = False
    confidence_threshold: float | None = Field(None, ge=0, le=1)
    iou_threshold: float | None = Field(None, ge=0, le=1)
    roi_scale: float = Field(1.0, gt=0)
    minimum_side: float = Field(5.0, ge=0)
    binarize_threshold: float = Field(0.3, ge=0, le=255)

    @model_validator(mode="after")
    def _one_way(self) -> Postprocessing:
        if self.layer_name is not None and self.layer_names:
            raise ValueError("give layer_name or layer_names, not both")
        if self.labels is not None and self.labels_file is not None:
            raise ValueError("give labels or labels_file, not both")
        if (self.cells_number_x is None) != (self.cells_number_y is None):
            raise ValueError("cells_number_x and cells_number_y go together")
        if self.cells_number_x is not None and self.cells_number is not None:
            raise ValueError("give cells_number, or cells_number_x and cells_number_y")
        if len(self.anchors) % 2:
            raise ValueError("anchors are pairs of width and height")
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The outputs that it is about; none for all."""
        single = () if self.layer_name in (None, "ANY") else (str(self.layer_name),)
        return self.layer_names or single

    @property
    def cells(self) -> tuple[int, int] | None:
        """Cells of the coarsest grid, across and down."""
        across, down = self.cells_number_x or self.cells_number, self.cells_number_y or self.cells_number
        return (across, down) if across and down else None


class _File(_Part):
    json_schema_version: str = ""
    input_preproc: tuple[dict[str, Any], ...] = ()
    output_postproc: tuple[dict[str, Any], ...]


class ExtraInput(_Part):
    """An input beside the picture, and what it is filled with."""

    name: str
    content: Literal["image_info", "sequence_index", "im_shape", "scale_factor"]
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class ModelProc:
    """A checked file."""

    inputs: tuple[Preprocessing, ...]
    image: ImageParams
    outputs: tuple[Postprocessing, ...]
    where: str

    @property
    def image_layer(self) -> str | None:
        """The input that takes pictures, if it is named."""
        return next((each.layer_name for each in self.inputs if each.format == "image"), None)


@dataclass(frozen=True)
class Picture:
    """The input of a model that takes pictures."""

    name: str
    layout: Literal["NCHW", "NHWC"]
    channels: int
    height: int
    width: int


def read_description(data: Mapping[str, Any], where: str) -> ModelProc:
    """Return a checked model-proc. Raises ModelError for a key, value or converter that is not understood."""
    file = _checked(_File, data, where)
    inputs = _entries(Preprocessing, file.input_preproc, f"{where}: input_preproc")
    images = [place for place, each in enumerate(inputs) if each.format == "image"]
    if len(images) > 1:
        raise ModelError("it describes several inputs that take pictures", where=f"{where}: input_preproc")
    image = ImageParams()
    for place, each in enumerate(inputs):
        spot = f"{where}: input_preproc.{place}.params"
        if each.format == "image":
            image = _checked(ImageParams, each.params, spot)
        else:
            _checked(InfoParams, each.params, spot)
    outputs = _entries(Postprocessing, file.output_postproc, f"{where}: output_postproc")
    for output in outputs:
        _check_converter(output.converter, where)
    if len(outputs) > 1 and not all(each.layers for each in outputs):
        raise ModelError(
            "it describes several outputs, and one of them is not named",
            where=f"{where}: output_postproc", hint="Give each entry layer_name or layer_names.",
        )  # fmt: skip
    return ModelProc(inputs, image, outputs, where)


def _entries(model: type[Model], entries: Sequence[Mapping[str, Any]], where: str) -> tuple[Model, ...]:
    return tuple(_checked(model, entry, f"{where}.{place}") for place, entry in enumerate(entries))


def _checked(model: type[Model], value: Any, where: str) -> Model:
    try:
        return checked(model, value, where=where)
    except ConfigError as error:
        raise ModelError(error.what, where=where, hint=error.hint) from error


def _check_converter(name: str | None, where: str) -> None:
    if name is not None and name not in _CONVERTERS:
        raise ModelError(
            f"the converter {name!r} is not one of a detector.{did_you_mean(name, _CONVERTERS)}",
            where=f"{where}: output_postproc",
            hint=f"Known: {', '.join(_CONVERTERS)}.",
        )


def spec_of(
    proc: ModelProc,
    picture: Picture,
    inputs: Sequence[ExtraInput],
    shapes: Mapping[str, Sequence[int]],
    read_labels: Callable[[str], Sequence[str]],
    notes: Sequence[str] = (),
) -> DetectorSpec:
    """Return the spec of a described detector.

    `shapes` are those of the model's outputs, -1 for what is open; `read_labels` returns the lines of a file that the
    model-proc names. Raises ModelError for what does not go together.
    """
    outputs, labels = _outputs(proc, shapes, read_labels)
    params, where = proc.image, f"{proc.where}: input_preproc"
    padding, channels = params.padding or Padding(), picture.channels
    margin = padding.margin
    if picture.width <= 2 * margin[0] or picture.height <= 2 * margin[1]:
        raise ModelError(f"padding leaves nothing of {picture.width}x{picture.height}", where=where)
    if (channels == 1) != (params.color_space == "GRAYSCALE") and params.color_space is not None:
        raise ModelError(f"color_space is {params.color_space}, and the input has {channels} channels", where=where)
    mean, std = params.mean or (0.0,), params.std or (1.0,)
    for name, values in (("mean", mean), ("std", std), ("padding.fill_value", padding.fill_value)):
        if len(values) != channels and len(set(values)) != 1:
            raise ModelError(f"{name} has {len(values)} values, and the input {channels} channels", where=where)
    scale, offset = _affine(params)
    crop = params.crop if params.crop and params.resize != "no-aspect-ratio" else "none"
    said = list(notes)
    if params.crop and crop == "none":
        said.append("crop is left out, because resize is no-aspect-ratio")
    names = [(each.converter or "").lower() for each in proc.outputs]
    unread = {what for name in names for end, what in _UNREAD.items() if name.endswith(end)}
    said += [f"boxes are read, and the {what} of the model are not" for what in sorted(unread)]
    try:
        return DetectorSpec(
            kind="described", height=None if params.by_multiple else picture.height,
            width=None if params.by_multiple else picture.width, multiple=params.resize_multiple,
            bounds=params.reshape_size if params.by_multiple else None, layout=picture.layout, input=picture.name,
            resize=_RESIZE.get(params.resize, "none" if crop != "none" else "stretch"),
            resample="bicubic" if crop == "central-resize" else "linear", crop=crop, margin=margin,
            centred=params.resize != "aspect-ratio-pad", fill=_of(padding.fill_value, channels),
            colours="RGB" if params.color_space == "RGB" else "BGR", channels=channels, scale=scale,
            mean=[m - offset * s for m, s in zip(_of(mean, channels), _of(std, channels), strict=True)],
            std=_of(std, channels), threshold=outputs[0].get("threshold", 0.5),
            labels=labels, inputs=[each.model_dump(mode="json") for each in inputs], outputs=outputs, notes=said,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=proc.where) from error


def _of(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a value for each channel."""
    return (values[0],) * channels if len(values) != channels else tuple(values)


def _affine(params: ImageParams) -> tuple[float, float]:
    """Return what pixels are multiplied by, and what is added at last.

    Pixels that are centred by mean and std are scaled to 0..1 before, unless range or scale say otherwise. The lower
    end of the range is added after the division by std: DL Streamer's order.
    """
    low, high = params.range or (0.0, 255.0)
    scale, offset = (high - low) / 255, low
    if params.scale is not None:
        scale, offset = scale / params.scale, offset / params.scale
    elif params.range is None and params.mean is not None:
        scale /= 255
    return scale, offset


def _outputs(
    proc: ModelProc, shapes: Mapping[str, Sequence[int]], read_labels: Callable[[str], Sequence[str]]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the descriptions of outputs, and the labels of all; labels that two share stand there once."""
    found: list[dict[str, Any]] = []
    labels: tuple[str, ...] = ()
    places: dict[tuple[str, ...], int] = {}
    for each in proc.outputs or (Postprocessing(),):
        own = _labels(each, read_labels)
        if own not in places:
            places[own] = len(labels)
            labels += own
        converter = _CONVERTERS[each.converter] if each.converter else _default(shapes, proc.where)
        if each.classes and own and each.classes > len(own):
            raise ModelError(
                f"it has {each.classes} classes and {len(own)} labels", where=f"{proc.where}: output_postproc"
            )
        described = Description(
            converter=converter, layers=each.layers, classes=each.classes, labels=len(own), first=places[own],
            anchors=each.anchors, masks=each.masks, boxes=each.bbox_number_on_cell, cells=each.cells,
            binarize=each.binarize_threshold, shortest=each.minimum_side,
            sigmoid=each.output_sigmoid_activation, softmax=each.do_cls_softmax, roi_scale=each.roi_scale,
            threshold=0.5 if each.confidence_threshold is None else each.confidence_threshold,
            nms=_NMS.get(converter) if each.iou_threshold is None or converter not in _NMS else each.iou_threshold,
        )  # fmt: skip
        found.append(described.model_dump(mode="json", exclude_defaults=True))
    return found, labels


def _labels(entry: Postprocessing, read_labels: Callable[[str], Sequence[str]]) -> tuple[str, ...]:
    if isinstance(entry.labels, tuple):
        return entry.labels
    path = entry.labels or entry.labels_file
    return tuple(read_labels(path)) if path else ()


def _default(shapes: Mapping[str, Sequence[int]], where: str) -> str:
    """Return the converter of outputs that nothing describes, by their names and shapes."""
    boxes = shapes.get("boxes", ())
    if len(boxes) >= 2 and boxes[-1] == 5:
        return "boxes_labels" if "labels" in shapes else "boxes_scores" if "scores" in shapes else "boxes"
    if any(len(shape) >= 2 and shape[-1] == 7 for shape in shapes.values()):
        return "detection_output"
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ModelError(
        "it does not say how outputs are read, and they do not show it",
        where=f"{where}: output_postproc",
        hint=f"Give an entry with a converter; the model has {listed}.",
    )
