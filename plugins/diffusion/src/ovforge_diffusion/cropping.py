"""Inpainting in a part of a picture: what is around the mask is cut out, made at the full size, and put back.

Source: `padding_mask_crop` of diffusers' inpainting pipelines, which have it from the AUTOMATIC1111 web UI, as "only
masked".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ovforge.errors import InputError

__all__ = ["Crop"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Crop:
    """A part of a picture: what lies in `box`, (left, top, right, bottom), is made at another size.

    `mask`, mode L, is of the picture's size.
    """

    picture: Image.Image
    mask: Image.Image
    box: Box

    @classmethod
    def around(cls, picture: Image.Image, mask: Image.Image, padding: int, size: tuple[int, int]) -> Crop:
        """Return the part with `padding` pixels around what is not black in a mask, as wide for its height as `size`.

        Where the picture is too small for that, the part has other sides. Raises InputError for a black mask.
        """
        rows, columns = np.nonzero(np.asarray(mask))
        if not len(rows):
            raise InputError("is black everywhere, so that nothing is to be painted", where="mask")
        left, right = max(int(columns.min()) - padding, 0), min(int(columns.max()) + 1 + padding, mask.width)
        top, bottom = max(int(rows.min()) - padding, 0), min(int(rows.max()) + 1 + padding, mask.height)
        ratio = size[0] / size[1]
        if (right - left) / (bottom - top) > ratio:
            top, bottom = _widened(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
        else:
            left, right = _widened(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
        return cls(picture, mask, (left, top, right, bottom))

    def seen(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return the part of the picture, or of a mask, scaled into a size; its borders go on where sides differ."""
        part = image.crop(self.box)
        wide, high = _inside(part.size, (width, height))
        scaled = part.resize((wide, high), Image.Resampling.LANCZOS)
        made = Image.new("RGB", (width, height))
        left, top = width // 2 - wide // 2, height // 2 - high // 2
        made.paste(scaled, (left, top))
        if top > 0:
            made.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            made.paste(scaled.resize((width, top), box=(0, high, width, high)), (0, top + high))
        elif left > 0:
            made.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            made.paste(scaled.resize((left, height), box=(wide, 0, wide, height)), (left + wide, 0))
        return made.convert(image.mode)

    def put_back(self, made: Image.Image) -> Image.Image:
        """Return the picture with what was made in its place, where the mask is not black."""
        left, top, right, bottom = self.box
        width, height = right - left, bottom - top
        wide, high = _around(made.size, (width, height))
        part = Image.new("RGB", (width, height))
        scaled = made.resize((wide, high), Image.Resampling.LANCZOS)
        part.paste(scaled, (width // 2 - wide // 2, height // 2 - high // 2))
        under = Image.new("RGB", self.picture.size)
        under.paste(part, (left, top))
        kept = Image.new("RGBa", self.picture.size)  # alpha is multiplied in, so that half-transparent edges are right
        kept.paste(self.picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask))
        result = under.convert("RGBA")
        result.alpha_composite(kept.convert("RGBA"))
        return result.convert("RGB")


def _widened(begin: int, end: int, more: int, length: int) -> tuple[int, int]:
    """Return a range with `more` places, evenly on both sides if they are there, within 0 to `length`."""
    begin, end = begin - more // 2, end + more - more // 2
    if end >= length:
        begin, end = begin - (end - length), length
    if begin < 0:
        begin, end = 0, end - begin
    return begin, min(end, length)


def _inside(size: tuple[int, int], into: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size with the same ratio of sides within another."""
    (width, height), (wide, high) = size, into
    if wide / high < width / height:
        return wide, height * wide // width
    return width * high // height, high


def _around(size: tuple[int, int], fill: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size with the same ratio of sides around another."""
    (width, height), (wide, high) = size, fill
    if wide / high > width / height:
        return wide, height * wide // width
    return width * high // height, high
