"""Pictures into a detector's input, and its boxes back into the picture."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.model import DetectorSpec

__all__ = ["Prepared", "prepare"]

Floats = NDArray[np.float32]
Size = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True)
class Prepared:
    """A picture as a detector takes it: `pixels` float32 (3, height, width), `mask` (height, width), 1 in the picture.

    The picture lies at the top left, `content` (height, width) large; `size` (height, width) was its own.
    """

    pixels: Floats
    mask: Floats
    content: Size
    size: Size

    @property
    def canvas(self) -> Size:
        """Height and width of `pixels`."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def restored(self, boxes: Floats) -> Floats:
        """Return boxes (n, 4), corners in pixels of the canvas, in pixels of the picture, inside it."""
        height, width = self.size
        scale = np.array([width / self.content[1], height / self.content[0]] * 2, np.float32)
        limits = np.array([width, height] * 2, np.float32)
        inside: Floats = np.clip(boxes * scale, 0, limits).astype(np.float32)
        return inside


def prepare(image: Image.Image, spec: DetectorSpec, fixed: Size | None = None) -> Prepared:
    """Scale, normalize and fill up an RGB picture. `fixed` is (height, width) of the input, whatever the picture's."""
    size = (image.height, image.width)
    content, canvas = _sizes(size, spec, fixed)
    scaled = image if content == size else image.resize(content[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(scaled)
    if spec.colours == "BGR":
        array = array[:, :, ::-1]
    pixels = (array * np.float32(spec.scale) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    fill = 0.0
    if spec.kind == "described":
        fill = (spec.fill * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    filled = np.empty((*canvas, 3), np.float32)
    filled[:] = fill
    filled[: content[0], : content[1]] = pixels
    mask = np.zeros(canvas, np.float32)
    mask[: content[0], : content[1]] = 1
    return Prepared(np.ascontiguousarray(filled.transpose(2, 0, 1)), mask, content, size)


def _sizes(size: Size, spec: DetectorSpec, fixed: Size | None) -> tuple[Size, Size]:
    """Return the size that a picture is scaled to, and that of the input, both (height, width)."""
    if spec.height and spec.width:
        canvas = (spec.height, spec.width)
        return (_fitted(size, canvas) if spec.keep_ratio else canvas), canvas
    if fixed:
        return _fitted(size, fixed), fixed
    content = _by_shortest(size, spec.shortest or min(size), spec.longest)
    return content, _enough(content, spec)


def _fitted(size: Size, canvas: Size) -> Size:
    """Return the largest size inside `canvas` of the same shape."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (min(max(1, round(side * scale)), most) for side, most in zip(size, canvas, strict=True))
    return height, width


def _by_shortest(size: Size, shortest: int, longest: int | None) -> Size:
    """Return the size whose shorter side is `shortest`, or whose longer one is `longest`; as transformers round."""
    low, high = min(size), max(size)
    short, exact = shortest, float(shortest)
    if longest and high / low * shortest > longest:
        exact = longest * low / high
        short = max(1, round(exact))
    if short == low:
        return size
    long = max(1, int(exact * high / low))
    return (short, long) if size[0] <= size[1] else (long, short)


def _enough(content: Size, spec: DetectorSpec) -> Size:
    """Return a size with as many places as the detector takes queries: thin pictures are filled up."""
    height, width = content
    while spec.strides and sum(ceil(height / s) * ceil(width / s) for s in spec.strides) < spec.queries:
        height, width = (height + spec.strides[0], width) if height <= width else (height, width + spec.strides[0])
    return height, width
