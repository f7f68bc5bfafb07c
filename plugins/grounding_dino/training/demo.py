"""Draw the scene that ships: python demo.py --packages node_modules --output ../src/ovforge_grounding_dino/demo"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scenes import Array, Objects, read_things

HEIGHT, WIDTH = 480, 640
PLACES = [  # word, which of its pictures, centre, side, in pixels
    ("sun", 0, 560, 70, 100), ("cloud", 0, 150, 75, 130), ("cloud", 0, 390, 60, 100), ("balloon", 0, 270, 150, 95),
    ("house", 0, 500, 245, 165), ("tree", 0, 90, 265, 180), ("tree", 1, 185, 280, 130), ("car", 0, 400, 345, 130),
    ("horse", 1, 235, 360, 150), ("dog", 1, 545, 405, 95), ("sunflower", 0, 70, 410, 90), ("ball", 0, 455, 435, 55),
]  # fmt: skip


def land() -> Array:
    """Return sky and hills, float32 (HEIGHT, WIDTH, 3)."""
    rows, columns = np.arange(HEIGHT)[:, None, None] / HEIGHT, np.arange(WIDTH) / WIDTH
    scene = np.array([0.42, 0.68, 0.95]) * (1 - rows) + np.array([0.93, 0.96, 1.0]) * rows + np.zeros((1, WIDTH, 1))
    for level, waves, colour in (
        (0.55, 0.06 * np.sin(2.2 * np.pi * columns + 0.6), (0.45, 0.72, 0.45)),
        (0.64, 0.05 * np.sin(3.1 * np.pi * columns + 2.4), (0.38, 0.66, 0.32)),
        (0.78, 0.03 * np.sin(2.4 * np.pi * columns + 4.2), (0.30, 0.58, 0.26)),
    ):
        scene[rows[..., 0] > level + waves] = colour
    return scene.astype(np.float32)


def main() -> None:
    """Write scene.jpg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--output", type=Path, default=Path("work/demo"))
    arguments = parser.parse_args()
    things = read_things()
    objects = Objects(arguments.packages, things)
    numbers = {thing.word: number for number, thing in enumerate(things)}
    canvas = land()
    for word, which, x, y, side in PLACES:
        picture = objects.known[numbers[word]][which]
        sprite = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA if side < 128 else cv2.INTER_CUBIC)
        top, left = y - side // 2, x - side // 2
        part = canvas[top : top + side, left : left + side]
        part[:] = part * (1 - sprite[..., 3:]) + sprite[..., :3]
    arguments.output.mkdir(parents=True, exist_ok=True)
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(arguments.output / "scene.jpg", quality=92, subsampling=0)


if __name__ == "__main__":
    main()
