"""Conditions for ControlNets: pictures as they are, or their edges, or what an autoencoder makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import RandomStream
from ovforge.errors import PluginError
from ovforge.model import open_picture
from ovforge_diffusion.architectures.base import Architecture, Condition
from ovforge_diffusion.inputs import Control
from ovforge_diffusion.request import Request
from ovforge_diffusion.resizing import resized_mask, scaled
from ovforge_diffusion.vae import Autoencoder

__all__ = ["canny", "conditions"]


def conditions(
    request: Request, architecture: Architecture, autoencoder: Autoencoder, rng: RandomStream
) -> list[dict[str, NDArray[Any]]]:
    """Return the inputs of each condition's ControlNet, with a row for each picture that is made.

    What is drawn comes before the latents, as in diffusers' pipelines.
    """
    pictures, size = len(request.prompts), (request.width, request.height)

    def draw(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return autoencoder.sample([autoencoder.encode(pixels)] * pictures, rng)

    def likeliest(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([autoencoder.likeliest(autoencoder.encode(pixels))] * pictures)

    roles = architecture.conditioned(len(request.controls))
    shown = (
        Condition(
            role=role,
            mode=control.mode,
            pixels=_pixels(_picture(control), *size),
            mask=_mask(control, *size),
            around=_around(control, *size),
            pictures=pictures,
            drawn=draw,
            likeliest=likeliest,
        )
        for role, control in zip(roles, request.controls, strict=True)
    )
    return [architecture.condition(each, request) for each in shown]


def _picture(control: Control) -> Image.Image:
    """Return a condition's picture, or its edges."""
    image: Image.Image = open_picture(control.image, "control.image")
    return canny(image, control.low, control.high) if control.preprocess == "canny" else image


def _pixels(image: Image.Image, width: int, height: int) -> NDArray[np.float32]:
    """Return a picture at a size, float32 (3, height, width) from 0 to 1."""
    values = np.asarray(scaled(image, width, height), np.float32) / np.float32(255.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _around(control: Control, width: int, height: int) -> NDArray[np.float32] | None:
    """Return the picture that a condition's mask is for, likewise."""
    return None if control.around is None else _pixels(open_picture(control.around, "control.around"), width, height)


def _mask(control: Control, width: int, height: int) -> NDArray[np.float32] | None:
    """Return a condition's mask, float32 (1, height, width): 1 for pixels to be painted anew, 0 for the others."""
    if control.mask is None:
        return None
    grey = np.asarray(resized_mask(control.mask, "control.mask", width, height), np.float32)
    return (grey[None] / np.float32(255) >= 0.5).astype(np.float32)


def canny(image: Image.Image, low: int, high: int) -> Image.Image:
    """Return a picture's edges, white on black (Canny 1986, by OpenCV). Raises PluginError if OpenCV is missing."""
    try:
        import cv2
    except ImportError as error:
        raise PluginError(
            "edges need OpenCV, which is not installed",
            where='control.preprocess = "canny"',
            hint="Run: pip install 'ovforge-diffusion[canny]'",
        ) from error
    edges = cv2.Canny(np.asarray(image), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2))
