"""Pictures into a detector's input, and its boxes back into the picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import InputError
from ovforge.model import DetectorSpec

__all__ = ["Placement", "Prepared", "Size", "mode_of", "placement", "prepare"]

LARGEST = 2**26
"""Places of an input whose size a thin picture could make endless."""

CROP_SCALE = 1.125
"""How much larger DL Streamer scales a picture that it crops."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING,
}  # fmt: skip
Floats = NDArray[np.float32]
Size = tuple[int, int]
"""Height, width."""


@dataclass(frozen=True)
class Prepared:
    """A picture as a detector takes it: `pixels` float32 (channels, height, width), `mask` (height, width), 1 inside.

    A point (x, y) of the picture, which is `size` large, lies at `scale` * (x, y) + `shift` of the pixels; `content`
    (height, width) is what of the picture is there.
    """

    pixels: Floats
    mask: Floats
    content: Size
    size: Size
    scale: tuple[float, float]
    """Across, down."""
    shift: tuple[float, float] = (0, 0)
    """Across, down; negative if the picture is cropped."""

    def emptied(self) -> Prepared:
        """Return it for decoding alone: all numbers of `pixels` and `mask` are one 0, which takes no memory."""
        nothing = np.float32(0)
        return replace(
            self,
            pixels=np.broadcast_to(nothing, self.pixels.shape),
            mask=np.broadcast_to(nothing, self.mask.shape),
        )

    @property
    def canvas(self) -> Size:
        """Height and width of `pixels`."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def restored(self, boxes: Floats) -> Floats:
        """Return boxes (n, 4), corners in pixels of the canvas, in pixels of the picture, inside it."""
        height, width = self.size
        limits = np.array([width, height] * 2, np.float32)
        inside: Floats = np.clip((boxes - np.array(self.shift * 2)) / np.array(self.scale * 2), 0, limits)
        return inside.astype(np.float32)


@dataclass(frozen=True)
class Placement:
    """How a picture comes into the input. Sizes are (height, width), places and scales (across, down)."""

    canvas: Size
    cut: tuple[int, int, int, int] | None
    """Part of the picture that is taken before it is scaled: left, top, right, bottom."""
    scaled: Size
    scale: tuple[float, float]
    offset: tuple[int, int]
    """Top left corner of what is kept of the scaled picture."""
    kept: Size
    place: tuple[int, int]
    """Where it is put."""


def mode_of(spec: DetectorSpec) -> str:
    """Return the mode that pictures are opened in."""
    return {1: "L", 3: "RGB", 4: "RGBA"}[spec.channels]


def prepare(image: Image.Image, spec: DetectorSpec, fixed: Size | None = None) -> Prepared:
    """Scale, normalize and fill up a picture of the spec's mode. `fixed` is (height, width) of an input of any size.

    Raises InputError if the picture does not come to a size that the detector takes.
    """
    size = (image.height, image.width)
    placed = placement(size, spec, fixed)
    part = image.crop(placed.cut) if placed.cut else image
    top, left = placed.offset[1], placed.offset[0]
    inside = (slice(top, top + placed.kept[0]), slice(left, left + placed.kept[1]))
    array = np.atleast_3d(np.asarray(_resized(part, placed.scaled, spec.resample)))[inside]
    if spec.colours == "BGR":
        array = array[:, :, [2, 1, 0, 3][: spec.channels] if spec.channels > 1 else [0]]
    filled = np.empty((*placed.canvas, spec.channels), np.float32)
    # transformers fills up what is normalized, DL Streamer what it normalizes then.
    filled[:] = _normalized(np.array(spec.fill, np.float32), spec) if spec.kind == "described" else 0
    x, y = placed.place
    where = (slice(y, y + placed.kept[0]), slice(x, x + placed.kept[1]))
    filled[where] = _normalized(array, spec)
    mask = np.zeros(placed.canvas, np.float32)
    mask[where] = 1
    across, down = placed.scale
    before = placed.cut or (0, 0)
    shift = (x - left - before[0] * across, y - top - before[1] * down)
    pixels = np.ascontiguousarray(filled.transpose(2, 0, 1))
    return Prepared(pixels, mask, placed.kept, size, (across, down), shift)


def placement(size: Size, spec: DetectorSpec, fixed: Size | None = None) -> Placement:
    """Return how a picture of `size` comes into the input; see `prepare`."""
    return _placed_in_streamer(size, spec) if spec.kind == "described" else _placed(size, spec, fixed)


def _normalized(pixels: NDArray[np.generic], spec: DetectorSpec) -> Floats:
    centred = np.asarray(pixels, np.float32) * np.float32(spec.scale) - np.array(spec.mean, np.float32)
    values: Floats = np.asarray(centred / np.array(spec.std, np.float32), np.float32)
    return values


def _resized(image: Image.Image, size: Size, resample: str) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    if resample != "linear":
        return image.resize((width, height), _FILTERS[resample])
    # Four neighbours of each point, however far a picture shrinks: OpenCV's INTER_LINEAR, to 1/255.
    across, down = image.width / width, image.height / height
    matrix = (across, 0.0, 0.0, 0.0, down, 0.0)
    return image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _placed(size: Size, spec: DetectorSpec, fixed: Size | None) -> Placement:
    """Return how transformers places a picture: at the top left."""
    own = (spec.height, spec.width) if spec.height and spec.width else None
    canvas = own or fixed
    if fixed and own is None:
        content = _fitted(size, fixed)
    elif spec.shortest:
        content = _by_shortest(size, spec.shortest, spec.longest)
    elif spec.resize == "fit":
        content = _inside(size, spec.bounds or canvas or size)
    else:
        content = size if spec.resize == "none" else spec.bounds or canvas or size
    canvas = canvas or _enough(content, spec)
    _check(content, canvas, spec)
    return Placement(canvas, None, content, (content[1] / size[1], content[0] / size[0]), (0, 0), content, (0, 0))


def _check(content: Size, canvas: Size, spec: DetectorSpec) -> None:
    if content[0] > canvas[0] or content[1] > canvas[1]:
        raise InputError(
            f"the picture comes to {content[1]}x{content[0]}, and the model's input is {canvas[1]}x{canvas[0]}",
            where="image",
            hint="The model does not scale pictures: give smaller ones.",
        )
    if any(side % spec.multiple for side in canvas):
        raise InputError(
            f"the picture comes to {canvas[1]}x{canvas[0]}, and the model takes multiples of {spec.multiple}",
            where="image",
            hint="Give pictures of such a size, or set load.height and load.width (--size), which stretches them.",
        )


def _placed_in_streamer(size: Size, spec: DetectorSpec) -> Placement:
    """Return how DL Streamer places a picture, by its `CustomImageConvert`: scaled, cropped, then put in its place."""
    if spec.resize == "multiple":
        canvas = _by_multiple(size, spec)
        return Placement(canvas, None, canvas, (canvas[1] / size[1], canvas[0] / size[0]), (0, 0), canvas, (0, 0))
    assert spec.height is not None
    assert spec.width is not None
    canvas = (spec.height, spec.width)
    inner = (spec.height - 2 * spec.margin[1], spec.width - 2 * spec.margin[0])
    cut = None
    if spec.crop == "central-resize":
        side = min(size)
        left, top = (size[1] - side) // 2, (size[0] - side) // 2
        cut = (left, top, left + side, top + side)
        scaled, scale = inner, (inner[1] / side, inner[0] / side)
    elif size == inner or spec.resize == "none":
        scaled, scale = size, (1.0, 1.0)
    elif spec.resize == "fit":
        factor = _inside_scale(size, inner) * (CROP_SCALE if spec.crop != "none" else 1)
        scaled, scale = _times(size, factor), (factor, factor)
    else:
        scaled, scale = inner, (inner[1] / size[1], inner[0] / size[0])
    over = (max(0, scaled[0] - inner[0]), max(0, scaled[1] - inner[1]))
    kept = (scaled[0] - over[0], scaled[1] - over[1])
    vertical, _, horizontal = spec.crop.partition("_")
    top = {"top": 0, "bottom": over[0]}.get(vertical, over[0] // 2)
    left = {"left": 0, "right": over[1]}.get(horizontal, over[1] // 2)
    place = ((canvas[1] - kept[1]) // 2, (canvas[0] - kept[0]) // 2) if spec.centred else (0, 0)
    return Placement(canvas, cut, scaled, scale, (left, top), kept, place)


def _by_multiple(size: Size, spec: DetectorSpec) -> Size:
    """Return the size of both sides by the scale nearer to 1, to whole multiples; halves are rounded up."""
    assert spec.bounds is not None
    scale = min((spec.bounds[0] / size[0], spec.bounds[1] / size[1]), key=lambda factor: abs(1 - factor))
    height, width = (max(floor(scale * side / spec.multiple + 0.5), 1) * spec.multiple for side in size)
    if height * width > LARGEST:
        raise InputError(
            f"the picture comes to {width}x{height}, which is more than {LARGEST} places",
            where="image",
            hint="Give a picture of a more usual shape, or cut it.",
        )
    return height, width


def _inside_scale(size: Size, bounds: Size) -> float:
    return min(bounds[0] / size[0], bounds[1] / size[1])


def _times(size: Size, factor: float) -> Size:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _inside(size: Size, bounds: Size) -> Size:
    """Return the largest size inside `bounds` of the same shape, cut to whole pixels, as transformers and OpenCV do."""
    return _times(size, _inside_scale(size, bounds))


def _fitted(size: Size, canvas: Size) -> Size:
    """Return the largest size inside `canvas` of the same shape."""
    scale = _inside_scale(size, canvas)
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
