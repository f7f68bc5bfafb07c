"""Videos on the command line: which task makes one, and what it is given beyond the inputs of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ovforge.errors import InputError

__all__ = ["video_of"]


def video_of(
    frames: int | None, rate: float | None, upscaler: Path | None, image: Path | None, **others: object
) -> tuple[str, dict[str, Any], dict[str, str]] | None:
    """Return the task of a video, its own inputs, and its parts, role -> folder or file; None for pictures.

    `others` are options for pictures alone, by name. Raises InputError for options that do not go together.
    """
    if frames is None:
        if rate is not None or upscaler is not None:
            where = "--upscaler" if rate is None else "--frame-rate"
            raise InputError("is for videos", where=where, hint="Say how many frames: --frames 121.")
        return None
    for name, given in others.items():
        if given:
            raise InputError(
                "is for pictures, and --frames asks for a video", where=f"--{name}", hint="Leave one of them out."
            )
    inputs: dict[str, Any] = {"num_frames": frames, **({} if rate is None else {"frame_rate": rate})}
    shown = image and str(image.resolve())
    if upscaler is not None:
        from ovforge_diffusion.video.upsampler import UPSAMPLER

        conditions = {"conditions": [{"image": shown}]} if shown else {}
        return "video-to-video", {**inputs, **conditions, "upscale": {}}, {UPSAMPLER: str(upscaler.resolve())}
    return ("image-to-video", {**inputs, "image": shown}, {}) if shown else ("text-to-video", inputs, {})
