"""Pictures and masks at the size that a model takes."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ovforge.model import open_picture

__all__ = ["resized", "resized_mask", "scaled"]


def resized(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return an RGB picture at a size, by Lanczos if it has another, as diffusers' image processor does."""
    return scaled(open_picture(image, where), width, height)


def resized_mask(image: Any, where: str, width: int, height: int) -> Image.Image:
    """Return a mask at a size, mode L: its brightness times its opacity, so that what is transparent is black."""
    return scaled(open_picture(image, where, "L", background="black"), width, height)


def scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture at a size, by Lanczos if it has another."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
