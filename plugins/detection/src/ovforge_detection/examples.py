"""Drawn scenes: inputs to calibrate, judge and measure detectors with, always the same."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ovforge_detection.results import DetectInputs

__all__ = ["examples", "scene"]

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 200),
    "yellow": (230, 200, 40),
    "white": (245, 245, 245),
}
THRESHOLD = 0.1
SHAPES = ("circle", "square", "triangle")


def examples(count: int, *, text: bool) -> list[DetectInputs]:
    """Return the first `count` of an endless sequence, of several sizes and shapes of picture.

    A low threshold keeps boxes that a model is not sure of: these, too, are to stay what they are.
    """
    found = []
    for number in range(count):
        image, names = scene(number)
        asked = " ".join(f"{name}." for name in names) if text else None
        found.append(DetectInputs(image=image, text=asked, threshold=THRESHOLD))
    return found


def scene(number: int) -> tuple[Image.Image, list[str]]:
    """Return picture `number`, RGB, and the names of what is drawn on it: "red circle", ..."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(32, 65, 2) * 10)
    low, high = rng.integers(60, 200, (2, 3))
    fade = np.linspace(0, 1, height)[:, None, None]
    ground = np.broadcast_to(low * (1 - fade) + high * fade, (height, width, 3)) + rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen, names = ImageDraw.Draw(image), []
    for _ in range(int(rng.integers(2, 7))):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        side = int(min(width, height) * rng.uniform(0.1, 0.4))
        left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        box = (left, top, left + side, top + side)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(left, top + side), (left + side // 2, top), (left + side, top + side)], fill=COLOURS[colour])
        names.append(f"{colour} {shape}")
    return image, list(dict.fromkeys(names))
