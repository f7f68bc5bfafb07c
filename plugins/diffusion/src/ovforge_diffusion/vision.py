"""What a vision-language model sees of pictures: how they are cut into patches and windows, and where tokens stand.

Sources: transformers' Qwen2VLImageProcessor (smart_resize, patchify), get_vision_window_index and
Qwen2_5_VLModel.get_rope_index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import InputError
from ovforge.store import parse_object
from ovforge_diffusion.damage import explained
from ovforge_diffusion.network import Network, not_finite

__all__ = ["Patches", "PictureProcessor", "VisionEncoder", "token_places"]

Array = NDArray[np.float32]
Ids = NDArray[np.int64]

_FILES = ("processor/preprocessor_config.json", "processor/processor_config.json")
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LEAST, _MOST = 56 * 56, 28 * 28 * 1280
_LONGEST = 200
"""The greatest ratio of a picture's sides."""
_WIDEST, _LARGEST = 4096, 2**24
"""Pixels a side of a window, and of a picture, at most: configs come from others."""


@dataclass(frozen=True)
class Patches:
    """A picture in windows: float32 (windows, patches, values), 1 for what is not filled up, and (row, column).

    `grid` is (rows, columns) of its tokens, and `order` where each of them, row by row, lies in the windows.
    """

    pixels: Array
    mask: Ids
    places: Ids
    grid: tuple[int, int]
    order: Ids


@dataclass(frozen=True)
class PictureProcessor:
    """Pictures as the files of `processor/` and the config of the vision encoder say."""

    patch: int
    merge: int
    frames: int
    window: int
    least: int
    most: int
    factor: float
    mean: Array
    deviation: Array

    @classmethod
    @explained
    def of(cls, assets: Mapping[str, bytes], config: Mapping[str, Any]) -> PictureProcessor:
        """Read the settings. `config` is that of the text encoder. Raises ModelError for values that make no sense."""
        own = _settings(assets)
        vision = config.get("vision_config") or {}
        size = own.get("size") or {}
        made = cls(
            patch=int(vision.get("patch_size", 14)),
            merge=int(vision.get("spatial_merge_size", 2)),
            frames=int(vision.get("temporal_patch_size", 2)),
            window=int(vision.get("window_size", 112)),
            least=int(own.get("min_pixels") or size.get("shortest_edge", _LEAST)),
            most=int(own.get("max_pixels") or size.get("longest_edge", _MOST)),
            factor=float(own.get("rescale_factor", 1 / 255)),
            mean=np.array(own.get("image_mean") or _MEAN, np.float32),
            deviation=np.array(own.get("image_std") or _DEVIATION, np.float32),
        )
        token = made.patch * made.merge
        if min(made.patch, made.merge, made.frames) < 1 or not token <= made.window <= _WIDEST or made.frames > token:
            raise ValueError("sizes of patches and windows must be positive, and windows hold a token")
        if not token**2 <= made.least <= made.most <= _LARGEST:
            raise ValueError(f"pictures must have a token at least, and {_LARGEST} pixels at most")
        numbers = np.concatenate([made.mean, made.deviation, [made.factor]])
        if not made.mean.shape == made.deviation.shape == (3,) or not np.isfinite(numbers).all():
            raise ValueError("image_mean and image_std must be three numbers each")
        if not made.deviation.all():
            raise ValueError("image_std must not be zero")
        return made

    def cut(self, image: Image.Image) -> Patches:
        """Return an RGB picture in windows. Raises InputError for one whose sides differ too much."""
        width, height = self._size(image.width, image.height)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        values = (np.asarray(image, np.float32) * np.float32(self.factor) - self.mean) / self.deviation
        rows, columns = height // self.patch // self.merge, width // self.patch // self.merge
        unit, side = self.patch, self.merge
        shape = (rows, side, unit, columns, side, unit, 3)
        # (row, column, row inside, column inside, channel, pixel's row, pixel's column), once for each frame
        cut = values.reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5)
        each = np.repeat(cut[:, :, :, :, :, None], self.frames, axis=5).reshape(rows, columns, side * side, -1)
        inside = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(1, 1, -1, 2)
        first = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)[:, :, None] * side
        mask = np.ones((rows, columns, side * side, 1), np.int64)
        tokens = self.window // self.patch // self.merge
        return Patches(
            pixels=_windows(each, tokens),
            mask=_windows(mask, tokens)[..., 0],
            places=_windows(first + inside, tokens),
            grid=(rows, columns),
            order=_order(rows, columns, tokens),
        )

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of whole tokens that is most like a picture, within the bounds of its pixels."""
        if max(width, height) > _LONGEST * min(width, height):
            raise InputError(
                f"is {width}x{height}",
                where="image",
                hint=f"Give pictures whose sides differ by {_LONGEST} times at most.",
            )
        unit = self.patch * self.merge
        high, wide = round(height / unit) * unit, round(width / unit) * unit
        if high * wide > self.most:
            scale = math.sqrt(height * width / self.most)
            high, wide = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
        elif high * wide < self.least:
            scale = math.sqrt(self.least / (height * width))
            high, wide = (math.ceil(side * scale / unit) * unit for side in (height, width))
        return wide, high


class VisionEncoder:
    """The model that gives the states of a picture's tokens."""

    def __init__(self, model: ov.CompiledModel, role: str) -> None:
        self._role = role
        self._network = Network(model, role)

    def __call__(self, patches: Patches) -> Array:
        """Return states, float32 (tokens, width), row by row. Raises ModelError if they are not finite."""
        inputs: dict[str, NDArray[Any]] = {
            "pixel_values": patches.pixels,
            "attention_mask": patches.mask,
            "position_ids": patches.places,
        }
        for name, value in inputs.items():
            self._network.allocate(name, value.shape).data[...] = value
        self._network.run()
        made = self._network.request.get_output_tensor(0).data
        states: Array = made.reshape(-1, made.shape[-1])[patches.order].astype(np.float32)
        if not np.isfinite(states).all():
            raise not_finite(self._role)
        return states


def token_places(ids: Ids, picture: int, grids: Sequence[tuple[int, int]]) -> Ids:
    """Return (time, row, column) of each token, (3, tokens). Pictures of these `grids` have the tokens `picture`.

    A picture's tokens stand at one time; what follows it stands behind its longer side.
    """
    places = np.zeros((3, len(ids)), np.int64)
    place = at = 0
    remaining = list(grids)
    while at < len(ids):
        if ids[at] == picture:
            rows, columns = remaining.pop(0)
            end = at + rows * columns
            places[:, at:end] = place
            places[1, at:end] += np.repeat(np.arange(rows), columns)
            places[2, at:end] += np.tile(np.arange(columns), rows)
            place += max(rows, columns)
        else:
            others = np.flatnonzero(ids[at:] == picture)
            end = at + int(others[0]) if len(others) else len(ids)
            places[:, at:end] = place + np.arange(end - at)
            place += end - at
        at = end
    return places


def _settings(assets: Mapping[str, bytes]) -> dict[str, Any]:
    for path in _FILES:
        if path in assets:
            found = parse_object(assets[path], path)
            return found.get("image_processor", found) if path == _FILES[1] else found
    return {}


def _windows(values: NDArray[Any], tokens: int) -> NDArray[Any]:
    """Return (rows, columns, patches, ...) of tokens as (windows, patches, ...); zeros fill up windows at the edges."""
    rows, columns, patches, *rest = values.shape
    down, right = -(-rows // tokens), -(-columns // tokens)
    padded = np.zeros((down * tokens, right * tokens, patches, *rest), values.dtype)
    padded[:rows, :columns] = values
    each = padded.reshape(down, tokens, right, tokens, patches, *rest).swapaxes(1, 2)
    return np.ascontiguousarray(each.reshape(down * right, tokens * tokens * patches, *rest))


def _order(rows: int, columns: int, tokens: int) -> Ids:
    """Return where each token, row by row, lies in the windows."""
    right = -(-columns // tokens)
    row, column = (each.reshape(-1) for each in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    window = row // tokens * right + column // tokens
    order: Ids = window * tokens**2 + row % tokens * tokens + column % tokens
    return order
