"""Frames into a detector's input by OpenVINO: scaled, filled up and normalized, with the numbers of `prepare`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovforge.model import DetectorSpec, core
from ovforge_detection.prepare import Placement, Prepared, Size, placement

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Scaler"]

KEPT = 4
"""Sizes of frames that graphs are kept for: streams rarely have more."""


@dataclass
class Scaler:
    """Prepares frames of any size for one detector. Each thread has requests of its own."""

    spec: DetectorSpec

    def __post_init__(self) -> None:
        self._lock, self._local = threading.Lock(), threading.local()
        self._compiled: dict[Size, ov.CompiledModel] = {}

    @classmethod
    def serves(cls, spec: DetectorSpec) -> bool:
        """Say whether the graph gives the numbers of `prepare`: it scales by four neighbours, and crops nothing."""
        return (
            spec.kind == "described"
            and spec.resample == "linear"
            and spec.crop == "none"
            and spec.resize in ("stretch", "fit")
            and bool(spec.height and spec.width)
            and spec.channels == 3
            and len(set(spec.fill)) == 1
        )

    def __call__(self, frame: NDArray[np.uint8]) -> Prepared:
        """Return an RGB frame (height, width, 3) as `prepare` does."""
        size = (frame.shape[0], frame.shape[1])
        placed = placement(size, self.spec)
        request = self._request(size, placed)
        request.infer([frame[None]], share_inputs=True)
        pixels = np.array(request.get_output_tensor().data[0])
        mask = np.broadcast_to(np.float32(1), placed.canvas)
        return Prepared(pixels, mask, placed.kept, size, placed.scale, placed.place)

    def _request(self, size: Size, placed: Placement) -> ov.InferRequest:
        requests: dict[Size, ov.InferRequest] = self._local.__dict__.setdefault("requests", {})
        if size not in requests:
            if len(requests) >= KEPT:
                requests.pop(next(iter(requests)))
            with self._lock:
                if size not in self._compiled:
                    if len(self._compiled) >= KEPT:
                        self._compiled.pop(next(iter(self._compiled)))
                    self._compiled[size] = core().compile_model(_graph(size, placed, self.spec), "CPU", _PROPERTIES)
                requests[size] = self._compiled[size].create_infer_request()
        return requests[size]


_PROPERTIES = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
"""One thread for each request: frames are prepared side by side."""


def _graph(size: Size, placed: Placement, spec: DetectorSpec) -> ov.Model:
    """Return a model: frame (1, height, width, 3) of bytes -> pixels (1, 3, height, width), float32."""
    import openvino as ov
    from openvino import opset13 as ops

    frame = ops.parameter([1, *size, 3], np.uint8, name="frame")
    value = ops.convert(ops.transpose(frame, np.array([0, 3, 1, 2])), "f32")
    if placed.scaled != size:
        value = ops.interpolate(
            value, np.array(placed.scaled, np.int64), "linear_onnx", "sizes",
            coordinate_transformation_mode="half_pixel", axes=np.array([2, 3], np.int64),
        )  # fmt: skip
        value = ops.floor(
            ops.add(value, np.float32(1e-4))
        )  # as Pillow cuts to bytes; sums of bytes and shares are rounded
    x, y = placed.place
    below, right = (
        whole - kept - before for whole, kept, before in zip(placed.canvas, placed.kept, (y, x), strict=True)
    )
    if x or y or below or right:
        fill = ops.constant(np.float32(spec.fill[0]))
        value = ops.pad(value, np.array([0, 0, y, x]), np.array([0, 0, below, right]), "constant", fill)
    if spec.colours == "BGR":
        value = ops.gather(value, np.array([2, 1, 0]), np.array(1))
    mean, std = (np.array(each, np.float32).reshape(1, -1, 1, 1) for each in (spec.mean, spec.std))
    value = ops.divide(ops.subtract(ops.multiply(value, np.float32(spec.scale)), mean), std)
    return ov.Model([value], [frame], "scale")
