"""Conditions for ControlNets: pictures as they are, or their edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import PluginError
from ovforge.model import open_picture
from ovforge_diffusion.inputs import Control

__all__ = ["canny", "condition"]


def condition(control: Control, width: int, height: int) -> NDArray[np.float32]:
    """Return a condition, float32 (3, height, width) from 0 to 1."""
    image = open_picture(control.image, "control.image")
    if control.preprocess == "canny":
        image = canny(image, control.low, control.high)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    values = np.asarray(image, np.float32) / np.float32(255.0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


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
