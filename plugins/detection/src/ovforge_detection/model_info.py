"""What an IR says of itself under `model_info` (Model API, Geti, Ultralytics), as a model-proc.

Source: DL Streamer's `model_api_converters.cpp`, and the keys of OpenVINO's Model API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["model_info", "proc_of_info"]

_RESIZE: dict[str, dict[str, str]] = {
    "standard": {"resize": "no-aspect-ratio"},
    "fit_to_window": {"resize": "aspect-ratio-pad"},
    "fit_to_window_letterbox": {"resize": "aspect-ratio"},
    "crop": {"crop": "central-resize"},
}
_YOLO = {"YOLOv8": "yolo_v8", "YOLOv9": "yolo_v8", "YOLOv10": "yolo_v10", "YOLO11": "yolo_v8", "YOLO26": "yolo_v26"}
"""Name in Ultralytics' metadata.yaml -> converter."""


def model_info(model: ov.Model) -> dict[str, str]:
    """Return a model's own description, values as text; {} if it has none."""
    if not model.has_rt_info(["model_info"]):
        return {}
    entries = model.get_rt_info(["model_info"]).value
    return {str(key): str(getattr(value, "value", value)) for key, value in dict(entries).items()}


def proc_of_info(info: Mapping[str, str], metadata: str, where: str) -> dict[str, Any]:
    """Return `model_info` as the content of a model-proc. `metadata` is the text of Ultralytics' metadata.yaml, or "".

    Means and deviations above 1 are meant for pixels from 0 to 255, as Model API has it; smaller ones for 0..1.
    """
    reader = _Info(info, where)
    params: dict[str, Any] = {}
    if "resize_type" in info:
        if info["resize_type"] not in _RESIZE:
            raise ModelError(
                f"resize_type {info['resize_type']!r} is not supported",
                where=where,
                hint=f"Known: {', '.join(_RESIZE)}. Describe the model by a model-proc: --model-proc, or load.proc.",
            )
        params |= _RESIZE[info["resize_type"]]
    if info.get("crop_type") in ("central", "central-resize"):
        params["crop"] = info["crop_type"]
    if "color_space" in info:
        params["color_space"] = info["color_space"]
    if "reverse_input_channels" in info:
        params["color_space"] = "RGB" if info["reverse_input_channels"].lower() in ("yes", "true") else "BGR"
    params |= _normalization(reader)
    if "pad_value" in info:
        params["padding"] = {"fill_value": [min(max(reader.numbers("pad_value", 1)[0], 0), 255)]}
    if "reshape" in info:
        params["reshape_size"] = [int(side) for side in reader.numbers("reshape", 2)]
    entry: dict[str, Any] = {}
    if kind := info.get("model_type"):
        entry["converter"] = _yolo(metadata) if kind == "YOLO" else kind
    for key in ("confidence_threshold", "iou_threshold"):
        if key in info:
            entry[key] = reader.numbers(key, 1)[0]
    if labels := [label for label in re.split("[,; ]+", info.get("labels", "")) if label]:
        entry["labels"] = labels
    return {"input_preproc": [{"params": params}], "output_postproc": [entry]}


def _normalization(reader: _Info) -> dict[str, Any]:
    mean = reader.numbers("mean_values", 1, 3) if "mean_values" in reader.info else []
    std = reader.numbers("scale_values", 1, 3) if "scale_values" in reader.info else []
    if len(std) == 1 and not mean:
        return {"scale": std[0]}
    if not mean and not std:
        return {}
    count = max(len(mean), len(std))
    whole = max([*mean, *std]) > 1
    means, deviations = mean or [0.0], std or [1.0]
    return {
        "mean": means * (count // len(means)), "std": deviations * (count // len(deviations)),
        **({"scale": 1.0} if whole else {}),
    }  # fmt: skip


def _yolo(metadata: str) -> str:
    """Return the converter of an Ultralytics export."""
    described = re.search(r"^description:(.*)$", metadata, re.MULTILINE)
    for name, converter in _YOLO.items():
        if described and name in described[1]:
            return converter
    return "yolo_v26" if re.search(r"^end2end:\s*true\s*$", metadata, re.MULTILINE) else "yolo_v8"


class _Info:
    """Values that are numbers in text."""

    def __init__(self, info: Mapping[str, str], where: str) -> None:
        self.info, self._where = info, where

    def numbers(self, key: str, *counts: int) -> list[float]:
        """Return the numbers of a value. Raises ModelError if their number is none of `counts`."""
        found = [float(number) for number in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", self.info[key])]
        if len(found) not in counts:
            raise ModelError(
                f"{key} is {self.info[key]!r}, not {' or '.join(map(str, counts))} numbers", where=self._where
            )
        return found
