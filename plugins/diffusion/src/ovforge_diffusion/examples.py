"""Inputs that show what the tasks are for: prompts, and drawn pictures with masks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["drawing", "edges", "hole", "prompts"]


@functools.cache
def _shipped() -> tuple[str, ...]:
    return tuple(files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").splitlines())


def prompts(count: int) -> Iterator[tuple[int, str]]:
    """Yield (number, prompt), from 0 on; beyond the shipped ones they come again, for other seeds.

    There is an even number of them, so that no prompt has both an even and an odd number.
    """
    shipped = _shipped()
    for number in range(count):
        yield number, shipped[number % len(shipped)]


def drawing(number: int, size: int) -> Image.Image:
    """Return picture `number`, RGB, size x size: sky, ground and things on it, drawn at random."""
    rng = np.random.default_rng(number)
    top, bottom, ground = rng.integers(0, 256, (3, 3))
    fade = np.linspace(0, 1, size)[:, None, None]
    sky = np.broadcast_to(top * (1 - fade) + bottom * fade, (size, size, 3)).astype(np.uint8)
    image = Image.fromarray(sky)
    draw = ImageDraw.Draw(image)
    horizon = int(size * rng.uniform(0.45, 0.8))
    draw.rectangle((0, horizon, size, size), fill=tuple(map(int, ground)))
    for shape in rng.choice(["ellipse", "rectangle", "triangle"], int(rng.integers(3, 8))):
        colour = tuple(map(int, rng.integers(0, 256, 3)))
        width, height = (int(size * part) for part in rng.uniform(0.1, 0.4, 2))
        left, upper = (int(place) for place in rng.uniform(0, size * 0.8, 2))
        if shape == "triangle":
            draw.polygon(
                [(left, upper + height), (left + width // 2, upper), (left + width, upper + height)], fill=colour
            )
        else:
            getattr(draw, shape)((left, upper, left + width, upper + height), fill=colour)
    grain = rng.normal(0, 6, (size, size, 3))
    return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))


def hole(number: int, size: int) -> Image.Image:
    """Return mask `number`, L, size x size: white where a picture is painted anew."""
    rng = np.random.default_rng(number)
    image = Image.new("L", (size, size), 0)
    left, upper = (int(place) for place in rng.uniform(0, size * 0.5, 2))
    right, lower = left + int(size * rng.uniform(0.3, 0.5)), upper + int(size * rng.uniform(0.3, 0.5))
    shape = "ellipse" if rng.random() < 0.5 else "rectangle"
    getattr(ImageDraw.Draw(image), shape)((left, upper, right, lower), fill=255)
    return image


def edges(number: int, size: int) -> Image.Image:
    """Return the edges of a drawing, RGB, white on black, as ControlNets take them."""
    found = drawing(number, size).convert("L").filter(ImageFilter.FIND_EDGES)
    return found.point(lambda level: 255 if level > 40 else 0).convert("RGB")
