"""Videos as inputs of tasks: a file's path, a folder of pictures, a list of pictures, or an array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BeforeValidator, TypeAdapter, ValidationInfo, WithJsonSchema

from ovforge.errors import InputError
from ovforge.model import Picture, open_picture, picture_name
from ovforge_diffusion.resizing import scaled
from ovforge_diffusion.vae import pixels_of

__all__ = ["Clip", "Footage", "clip_name", "read_footage"]

_ANIMATED = ("WEBP", "GIF", "PNG")
"""Formats of moving pictures that Pillow reads."""
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_MAX_PIXELS = 2**26
"""Largest frame that is decoded."""
_ALONE = {"protocol_whitelist": "data"}
"""What keeps FFmpeg from opening what an open file names, such as the parts of a playlist."""
_FASTEST = 240
"""Frames a second."""
_SIDE = 32
"""Pixels that sides are multiples of."""
_WHOLE = 2**28
"""Pixels in all frames of a video that is read, which are then float32."""
_MOST = 4096
"""Pictures of a list or folder."""
_INSTALL = "Run: pip install 'ovforge-diffusion[video]', or give a .webp or .gif file, or a folder of pictures."
_ONE: TypeAdapter[Any] = TypeAdapter(Picture)


def _clip(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3 or not len(value):
            raise ValueError(f"an array must be uint8 (frames, height, width, 3), not {value.dtype} {value.shape}")
        return value
    if isinstance(value, str | Path):
        path = _ONE.validate_python(value, context=info.context)
        return _pictures_in(path) if path.is_dir() else path
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= _MOST:
            raise ValueError(f"{len(value)} pictures, and a video has 1 to {_MOST}")
        return [_ONE.validate_python(each, context=info.context) for each in value]
    raise ValueError(f"must be a path, a list of pictures or an array, not {type(value).__name__}")


def _pictures_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not 1 <= len(found) <= _MOST:
        raise ValueError(f"{folder} has {len(found)} pictures, and a video has 1 to {_MOST}")
    return found


Clip = Annotated[
    Any,
    BeforeValidator(_clip),
    WithJsonSchema({"type": "string", "format": "path", "contentMediaType": "video/*"}),
]
"""Type of an input that is a video. A relative path starts at the config's folder; a folder is its pictures, in the
order of their names."""


@dataclass(frozen=True)
class Footage:
    """Frames that were read, float32 (3, frames, height, width) from -1 to 1, and how many a second there are.

    `rate` is None for what does not say it, or says more than 240.
    """

    pixels: NDArray[np.float32]
    rate: float | None


def _read_frames(value: Path | Sequence[Any] | NDArray[np.uint8], where: str) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of a video as they are asked for: upright, mode RGB, and seconds that each is seen, 0 if unsaid.

    Raises InputError, naming `where`, for what cannot be read, and PyAV's absence if a file needs it.
    """
    if isinstance(value, Path):
        yield from _of_file(value, where)
    elif isinstance(value, np.ndarray):
        yield from ((Image.fromarray(frame), 0.0) for frame in value)
    else:
        for picture in value:
            yield open_picture(picture, where), 0.0


def read_footage(
    value: Path | Sequence[Any] | NDArray[np.uint8],
    where: str,
    size: tuple[int, int] | None,
    unit: int,
    notes: list[str],
    room: int = _MOST + 1,
    every: int = 1,
) -> Footage:
    """Return the first frames of a video, or with `every` = 2 each second one of them.

    They are one more than a multiple of `unit`, and at most `room`; what is left out is said in `notes`. They get a
    `size` (width, height), or that of the first of them, rounded down to multiples of 32.
    """
    frames: list[NDArray[np.float32]] = []
    seconds = 0.0
    left = _read_frames(value, where)
    for frame, seen in islice(left, 0, (room - 1) * every + 1, every):
        seconds += seen
        size = size or (max(frame.width // _SIDE, 1) * _SIDE, max(frame.height // _SIDE, 1) * _SIDE)
        if (len(frames) + 1) * size[0] * size[1] > _WHOLE:
            raise InputError(
                f"{len(frames) + 1} frames of {size[0]}x{size[1]} are more than {_WHOLE} pixels",
                where=where,
                hint="Give a shorter video, or a smaller size.",
            )
        frames.append(pixels_of(scaled(frame, *size)))
    if not frames:
        raise InputError("has no frame", where=where, hint="Play it, and save it again.")
    used = (len(frames) - 1) // unit * unit + 1
    if used < len(frames) or next(left, None) is not None:
        which = f"its first {used} frames are taken"
        if every > 1:
            which = f"of its first {(used - 1) * every + 1} frames the first run takes every second"
        notes.append(f"{where}: {which}, and the others left out")
    rate = len(frames) / seconds if seconds else 0.0
    return Footage(np.stack(frames[:used], axis=1), rate if 0 < rate <= _FASTEST else None)


def clip_name(value: Path | Sequence[Any] | NDArray[np.uint8]) -> Any:
    """Return what provenance says of a video: paths, or digests of what was given in memory."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return "sha256:" + hashlib.sha256(f"{value.shape}".encode() + value.tobytes()).hexdigest()
    return [picture_name(each) for each in value]


def _of_file(path: Path, where: str) -> Iterator[tuple[Image.Image, float]]:
    try:
        with Image.open(path, formats=_ANIMATED) as file:
            _check_size(file.width, file.height, where)
            for number in range(getattr(file, "n_frames", 1)):
                file.seek(number)
                picture = open_picture(file.copy(), where)  # which reads the frame, and only then is its time known
                yield picture, float(file.info.get("duration") or 0) / 1000
        return
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", where=where) from error
    except UnidentifiedImageError:
        pass
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, where, error) from error
    yield from _of_container(path, where)


def _of_container(path: Path, where: str) -> Iterator[tuple[Image.Image, float]]:
    """Yield the frames of a file that FFmpeg reads. It reaches no other file and no host."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path} needs PyAV, which is not installed", where=where, hint=_INSTALL) from error
    try:
        with path.open("rb") as file, av.open(file, options=_ALONE) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no pictures", where=where, hint="Give a video.")
            rate = container.streams.video[0].average_rate
            seconds = float(1 / rate) if rate else 0.0
            for frame in container.decode(video=0):
                _check_size(frame.width, frame.height, where)
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round((frame.rotation or 0) / 90) % 4)
                yield Image.fromarray(np.ascontiguousarray(turned)), seconds
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, where, error) from error


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > _MAX_PIXELS:
        raise InputError(f"frames of {width}x{height} are larger than {_MAX_PIXELS} pixels", where=where)


def _unreadable(path: Path, where: str, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a readable video: {error}", where=where, hint="Play it, and save it as .mp4 or .webm again."
    )
