"""The loader of RT-DETR (Zhao et al. 2023), RT-DETRv2 (Lv et al. 2024) and D-FINE (Peng et al. 2024)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts import Match
from ovforge.errors import ModelError
from ovforge.model import DetectorSpec, ModelBundle, Source, read_json
from ovforge_convert import Port, convert_module, need, pretrained, read_safetensors

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["DetrLoader", "DetrOptions"]

INSTALL = 'pip install "ovforge-detection[convert]"'
KINDS = {
    "rt_detr": "RTDetrForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "d_fine": "DFineForObjectDetection",
}
INCOMPLETE = "The folder may be an incomplete download: fetch it again."


class DetrOptions(BaseModel):
    """How a detector is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["f16", "f32"] = Field("f16", description="How weights are stored.")
    height: int | None = Field(None, gt=0, multiple_of=32, description="Height of the input; default: the model's own.")
    width: int | None = Field(None, gt=0, multiple_of=32, description="Width of the input; default: the model's own.")


class DetrLoader:
    """Converts detectors with classes of their own, for one size of input and any number of pictures."""

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
        processor = {}
        if "preprocessor_config.json" in source.files():
            processor = read_json(source, "preprocessor_config.json")
        spec = self._spec(config, processor, source.name)
        bundle = ModelBundle()
        bundle.configs["detector"] = spec.put({key: value for key, value in config.items() if key != "_name_or_path"})
        bundle.models.lazy("detector", partial(self._convert, source, config, spec))
        return bundle

    def _spec(self, config: dict[str, Any], processor: dict[str, Any], where: str) -> DetectorSpec:
        size = processor.get("size") or {"height": 640, "width": 640}
        normal = processor.get("do_normalize", False)
        try:
            labels = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
            return DetectorSpec(
                kind="classes",
                height=self.options.height or size["height"],
                width=self.options.width or size["width"],
                scale=processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0,
                mean=processor["image_mean"] if normal else (0, 0, 0),
                std=processor["image_std"] if normal else (1, 1, 1),
                labels=tuple(labels.get(number, f"class {number}") for number in range(max(labels, default=-1) + 1)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"says nothing usable of pictures: {error}", where=f"{where}: preprocessor_config.json"
            ) from error

    def _convert(self, source: Source, config: dict[str, Any], spec: DetectorSpec) -> ov.Model:
        module = pretrained(KINDS[config["model_type"]], config, read_safetensors(source, INCOMPLETE), source.name)
        assert spec.height is not None
        assert spec.width is not None
        own = module.forward

        def forward(pixel_values: Any) -> tuple[Any, Any]:
            found = own(pixel_values=pixel_values, return_dict=True)
            return found.logits, found.pred_boxes

        # Its anchors, and its encoder's positions, are made for the size that it is traced with.
        sides = (spec.height, spec.width)
        inputs = [Port("pixel_values", (None, 3, *sides), (2, 3, *sides))]
        return convert_module("detector", module, forward, inputs, ["logits", "boxes"], self.options.weights)
