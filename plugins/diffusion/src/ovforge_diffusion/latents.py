"""Latents that the user brings: .npy files, numpy's text, arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import InputError
from ovforge.model import reading_arrays

__all__ = ["open_latents", "read_latents"]

_SIDES = {
    4: "The model, the size and the number of pictures decide it. Latents are not packed into tokens here.",
    5: "(videos, channels, frames, height / 32, width / 32) for LTX-Video's: set width, height and num_frames to fit.",
}
"""Axes -> what decides their sizes."""
_LIMIT = 2**30
"""Largest file that is read, in bytes."""


def read_latents(value: Path | NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return latents, float32 of `shape`; one picture's are taken for every picture.

    Text holds the numbers in the order of memory, as numpy.savetxt writes a flat array. Raises InputError for a file
    that cannot be read, another shape, or numbers that are not finite.
    """
    where = _where(value)
    latents = open_latents(value)
    if latents.ndim == 1:  # text knows no shape
        latents = latents.reshape(-1, *shape[1:]) if latents.size % int(np.prod(shape[1:])) == 0 else latents
    if latents.ndim == len(shape) - 1:
        latents = latents[None]
    if latents.shape[1:] != shape[1:] or latents.shape[0] not in (1, shape[0]):
        raise InputError(
            f"latents of shape {latents.shape}, and {shape} is needed",
            where=where,
            hint=_SIDES.get(len(shape)),
        )
    return np.array(np.broadcast_to(latents, shape), np.float32, order="C")


def open_latents(value: Path | NDArray[Any]) -> NDArray[Any]:
    """Return the numbers of a file or an array, of any shape. Raises InputError for what holds no finite numbers."""
    latents = _read(value) if isinstance(value, Path) else np.asarray(value)
    if latents.dtype.kind not in "fiu":
        raise InputError(f"holds {latents.dtype}, not numbers", where=_where(value))
    if not np.isfinite(latents).all():
        raise InputError("holds numbers that are not finite", where=_where(value))
    return latents


def _where(value: Path | NDArray[Any]) -> str:
    return str(value) if isinstance(value, Path) else "latents"


def _read(path: Path) -> NDArray[Any]:
    try:
        if path.stat().st_size > _LIMIT:
            raise InputError(f"is larger than {_LIMIT} bytes", where=str(path))
        if path.suffix.lower() == ".npy":
            with reading_arrays(path):
                array: NDArray[Any] = np.load(path, allow_pickle=False)
            return array
        return np.array(path.read_text().replace(",", " ").split(), np.float32)
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"no latents can be read: {error}", where=str(path), hint="Expected .npy, or numbers as text."
        ) from error
