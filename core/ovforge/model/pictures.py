"""Pictures as inputs of tasks: a file's path, a PIL image, or an array.

Every mode is read as 8 bits a channel. Pixels of 8 bits stay as they are, those of 16 bits are scaled from 0..65535.
Integer pixels of 32 bits and floating-point ones do not say their range: it is the smallest of 0..1 (floating point
only), 0..255, 0..65535 and the type's own (0..2147483647, or 0..4294967295 for unsigned and floating-point ones) that
holds the largest of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from ovforge.errors import InputError, ModelError
from ovforge.model.sources import PACKAGE, package_path

__all__ = ["MAX_PIXELS", "Picture", "digest_picture", "open_picture", "picture_name"]

MAX_PIXELS = 2**28
"""Largest picture that is opened, in pixels."""

IN_MEMORY = "sha256:"

_WIDE = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I", "F"})
"""Modes with more than 8 bits a pixel, all grey."""


def _picture(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str) and value.startswith(IN_MEMORY):
        raise ValueError("the picture was given in memory, and only its digest is known: give the picture again")
    if isinstance(value, str | Path):
        if isinstance(value, str) and value.startswith(PACKAGE):
            return _shipped(value)
        base = (info.context or {}).get("base")
        path = Path(value).expanduser()
        return Path(base) / path if base else path
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3, 4)):
            raise ValueError(f"an array must be uint8 (height, width[, 1, 3 or 4]), not {value.dtype} {value.shape}")
        return Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value)
    raise ValueError(f"must be a path, a PIL image or an array, not {type(value).__name__}")


def _shipped(value: str) -> Path:
    try:
        return package_path(value)
    except ModelError as error:
        raise ValueError(f"{error.what}. {error.hint}") from error


Picture = Annotated[
    Any,
    BeforeValidator(_picture),
    WithJsonSchema({"type": "string", "format": "path", "contentMediaType": "image/*"}),
]
"""Type of an input that is a picture; a relative path starts at the config's folder, "package:NAME/PATH" in an
installed Python package. Programs that ask people for inputs know it by the media type in its JSON Schema."""


def open_picture(value: Path | Image.Image, where: str, mode: str = "RGB", background: str = "white") -> Image.Image:
    """Return a picture in `mode`, upright by its EXIF orientation.

    Transparent parts show `background`, a colour's name; the mode RGBA keeps them transparent. A mask is read with mode
    "L" and a black background: its brightness times its opacity, so that what is transparent counts as black.

    Raises InputError, naming `where`, for a file that is missing, damaged or not a picture, and for pixels that are
    negative or not finite.
    """
    try:
        if isinstance(value, Path):
            with Image.open(value) as file:
                _check_size(file, where)
                image, kind = ImageOps.exif_transpose(file), _declared(file)
                image.load()
        else:
            _check_size(value, where)
            image, kind = ImageOps.exif_transpose(value), _declared(value)
        return _converted(_eight_bits(image, kind), mode, background)
    except FileNotFoundError as error:
        raise InputError(f"{value}: no such file", where=where) from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{value} is not a readable picture: {error}",
            where=where,
            hint="Open it in a viewer, and save it again.",
        ) from error


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"a picture of {width}x{height} is larger than {MAX_PIXELS} pixels", where=where)


def _converted(image: Image.Image, mode: str, background: str) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if mode == "RGBA":
            return layer
        image = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
    return image if image.mode == mode else image.convert(mode)


def _declared(image: Image.Image) -> np.dtype[Any]:
    """Return the type of a picture's pixels as its file declares it, which Pillow's modes F and I do not tell apart.

    Pillow reads a PGM of 16 bits as mode I, scaled to the whole range of 16; and unsigned TIFFs of 32 bits as signed.
    """
    if image.mode == "F":
        return np.dtype(np.float32)
    if image.mode.startswith("I;16") or image.format == "PPM":
        return np.dtype(np.uint16)
    sample_format = getattr(image, "tag_v2", {}).get(339, (1,) if image.format == "TIFF" else (2,))
    return np.dtype(np.uint32 if sample_format[0] == 1 else np.int32)


def _eight_bits(image: Image.Image, kind: np.dtype[Any]) -> Image.Image:
    """Return a picture of a mode that Pillow converts to all others; those of wide pixels and L*a*b* are not."""
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB")) or image
    if image.mode not in _WIDE:
        return image
    values = np.asarray(image)
    values = values.view(kind) if kind == np.uint32 else values
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("it has pixels that are negative or not finite")
    grey = Image.fromarray(np.rint(values * (255 / _white(values, kind))).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _white(values: NDArray[Any], kind: np.dtype[Any]) -> int:
    """Return the end of the range that the values are in."""
    if kind == np.uint16:
        return 2**16 - 1
    floating = kind == np.float32
    ends = [1] * floating + [2**8 - 1, 2**16 - 1, 2**32 - 1 if floating else np.iinfo(kind).max]
    largest = values.max(initial=0)
    for end in ends:
        if largest <= end:
            return end
    raise ValueError(f"its largest pixel, {largest:g}, is above {ends[-1]}")


def picture_name(value: Path | Image.Image) -> str:
    """Return what provenance says of a picture: its path, or the digest of one that was given in memory."""
    return str(value) if isinstance(value, Path) else IN_MEMORY + digest_picture(value)


def digest_picture(value: Path | Image.Image) -> str:
    """Return the sha256 (hex) of a picture: of the file, or of the pixels."""
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()
    return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
