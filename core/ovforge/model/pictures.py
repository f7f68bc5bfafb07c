"""Pictures as inputs of tasks: a file's path, a PIL image, or an array."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from ovforge.errors import InputError, ModelError
from ovforge.model.sources import PACKAGE, package_path

__all__ = ["MAX_PIXELS", "Picture", "digest_picture", "open_picture", "picture_name"]

MAX_PIXELS = 2**28
"""Largest picture that is opened, in pixels."""

IN_MEMORY = "sha256:"


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


Picture = Annotated[Any, BeforeValidator(_picture), WithJsonSchema({"type": "string", "format": "path"})]
"""Type of an input that is a picture; a relative path starts at the config's folder, "package:NAME/PATH" in an
installed Python package."""


def open_picture(value: Path | Image.Image, where: str, mode: str = "RGB") -> Image.Image:
    """Return a picture in `mode`, upright by its EXIF orientation. Transparent parts become white.

    Raises InputError, naming `where`, for a file that is missing, damaged or no picture.
    """
    try:
        if isinstance(value, Path):
            with Image.open(value) as file:
                _check_size(file, where)
                image = ImageOps.exif_transpose(file)
                image.load()
        else:
            _check_size(value, where)
            image = ImageOps.exif_transpose(value)
        return _converted(image, mode)
    except FileNotFoundError as error:
        raise InputError(f"{value}: no such file", where=where) from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{value} is no readable picture: {error}", where=where, hint="Open it in a viewer, and save it again."
        ) from error


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"a picture of {width}x{height} is larger than {MAX_PIXELS} pixels", where=where)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I"):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == mode else image.convert(mode)


def picture_name(value: Path | Image.Image) -> str:
    """Return what provenance says of a picture: its path, or the digest of one that was given in memory."""
    return str(value) if isinstance(value, Path) else IN_MEMORY + digest_picture(value)


def digest_picture(value: Path | Image.Image) -> str:
    """Return the sha256 (hex) of a picture: of the file, or of the pixels."""
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()
    return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
