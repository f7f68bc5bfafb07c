"""The loader of RT-DETR (Zhao et al. 2023), RT-DETRv2 (Lv et al. 2024) and D-FINE (Peng et al. 2024).

Pictures are scaled, padded and normalized as preprocessor_config.json says. Source: transformers' image processors.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts import Match
from ovforge.errors import ModelError
from ovforge.model import DetectorSpec, ModelBundle, Source, read_json
from ovforge_convert import Port, convert_module, need, pretrained, read_safetensors
from ovforge_detection.decode import MAX_CLASSES

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["DetrLoader", "DetrOptions"]

INSTALL = 'pip install "ovforge-detection[convert]"'
KINDS = {
    "rt_detr": "RTDetrForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "d_fine": "DFineForObjectDetection",
}
TRACED = (192, 256)
"""Height and width that a model for any size is converted with."""
STRIDE = 32
"""Of the coarsest feature map: sides of the input are multiples of it."""
PROCESSORS: dict[str, dict[str, Any]] = {
    "RTDetrImageProcessor": {"size": {"height": 640, "width": 640}},
    "DetrImageProcessor": {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_normalize": True},
}
"""Kind of image processor -> what it does unless the file says otherwise."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters, by their numbers."""
INCOMPLETE = "The folder may be an incomplete download: fetch it again."


class DetrOptions(BaseModel):
    """How a detector is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["f16", "f32"] = Field("f16", description="How weights are stored.")
    height: int | None = Field(None, gt=0, multiple_of=32, description="Height of the input; default: the model's own.")
    width: int | None = Field(None, gt=0, multiple_of=32, description="Width of the input; default: the model's own.")


class DetrLoader:
    """Converts detectors with classes of their own, for the sizes of input that their image processor gives."""

    def __init__(self, options: DetrOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say yes to a transformers folder, by its config.json."""
        files = source.files()
        if "config.json" not in files or not any(path.endswith(".safetensors") for path in files):
            return Match.NO
        try:
            return Match.YES if read_json(source, "config.json").get("model_type") in KINDS else Match.NO
        except ModelError:
            return Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle, its role converted when asked for. Raises PluginError without torch, or ModelError."""
        for module in ("torch", "transformers", "safetensors"):
            need(module, INSTALL)
        config = read_json(source, "config.json")
        if config.get("model_type") not in KINDS:
            raise ModelError(
                f"config.json is that of a {config.get('model_type')!r}",
                where=source.name,
                hint=f"This loader converts {', '.join(KINDS)}.",
            )
        spec = self._spec(config, _processor(source), source.name)
        bundle = ModelBundle()
        bundle.configs["detector"] = spec.put({key: value for key, value in config.items() if key != "_name_or_path"})
        bundle.models.lazy("detector", partial(self._convert, source, config, spec))
        return bundle

    def _spec(self, config: dict[str, Any], processor: dict[str, Any], where: str) -> DetectorSpec:
        normal, rescaled = processor.get("do_normalize", False), processor.get("do_rescale", True)
        try:
            labels = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
            if (last := max(labels, default=-1)) >= MAX_CLASSES:
                raise ValueError(f"id2label has a class {last}, and classes are 0 to {MAX_CLASSES - 1}")
            return DetectorSpec(
                kind="classes",
                **self._size(processor),
                multiple=STRIDE,
                resample=RESAMPLE[processor.get("resample", 2)],
                scale=processor.get("rescale_factor", 1 / 255) if rescaled else 1.0,
                mean=processor.get("image_mean", MEAN) if normal else (0, 0, 0),
                std=processor.get("image_std", STD) if normal else (1, 1, 1),
                labels=tuple(labels.get(number, f"class {number}") for number in range(last + 1)),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(
                f"it does not say how pictures are scaled: {error}", where=f"{where}: preprocessor_config.json"
            ) from error

    def _size(self, processor: dict[str, Any]) -> dict[str, Any]:
        """Return the spec's keys for a processor's size, or for the size that the options ask for."""
        size, canvas = dict(processor["size"]), {}
        if self.options.height or self.options.width:
            own = size if "height" in size else {}
            return {
                "height": self.options.height or own.get("height") or self.options.width,
                "width": self.options.width or own.get("width") or self.options.height,
            }
        if processor.get("do_pad") and (padded := processor.get("pad_size")):
            canvas = {"height": padded["height"], "width": padded["width"]}
        if not processor.get("do_resize", True):
            return {"resize": "none", **canvas}
        if size.get("shortest_edge") and size.get("longest_edge"):
            return {"shortest": size["shortest_edge"], "longest": size["longest_edge"], **canvas}
        if size.get("max_height") and size.get("max_width"):
            return {"resize": "fit", "bounds": (size["max_height"], size["max_width"]), **canvas}
        fixed = {"height": size["height"], "width": size["width"]}
        if canvas in ({}, fixed):
            return fixed
        return {"bounds": (size["height"], size["width"]), **canvas}

    def _convert(self, source: Source, config: dict[str, Any], spec: DetectorSpec) -> ov.Model:
        # Anchors that are made for one size are the same ones that the model makes for that size when it runs.
        config = {**config, "anchor_image_size": None}
        module = pretrained(KINDS[config["model_type"]], config, read_safetensors(source, INCOMPLETE), source.name)
        own = module.forward

        def forward(pixel_values: Any) -> tuple[Any, Any]:
            found = own(pixel_values=pixel_values, return_dict=True)
            return found.logits, found.pred_boxes

        sides = (spec.height, spec.width) if spec.height and spec.width else (None, None)
        traced = (spec.height or TRACED[0], spec.width or TRACED[1])
        inputs = [Port("pixel_values", (None, 3, *sides), (2, 3, *traced))]
        return convert_module("detector", module, forward, inputs, ["logits", "boxes"], self.options.weights)


def _processor(source: Source) -> dict[str, Any]:
    """Return the image processor's settings with its kind's defaults. Raises ModelError for an unknown kind."""
    found: dict[str, Any] = {}
    if "preprocessor_config.json" in source.files():
        found = read_json(source, "preprocessor_config.json")
    elif "processor_config.json" in source.files():
        found = read_json(source, "processor_config.json").get("image_processor") or {}
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "RTDetrImageProcessor")
    for name, defaults in PROCESSORS.items():
        if kind in (name, f"{name}Fast", f"{name}Pil"):
            return {**defaults, **{key: value for key, value in found.items() if value is not None}}
    raise ModelError(
        f"the image processor {kind!r} is not known", where=f"{source.name}: preprocessor_config.json",
        hint=f"Known: {', '.join(PROCESSORS)}. Set load.height and load.width, and take the file out of the folder.",
    )  # fmt: skip
