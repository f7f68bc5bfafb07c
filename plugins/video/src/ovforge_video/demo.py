"""A clip that is made on the fly, for `ovforge video --demo`: emoji that move over a photograph."""

from __future__ import annotations

import math
from fractions import Fraction
from importlib import resources
from pathlib import Path

import av
from PIL import Image

__all__ = ["MODEL", "TEXT", "write_clip"]

MODEL = "package:ovforge_grounding_dino/model"
"""The detector: a GroundingDINO that ships with its plugin."""
TEXT = "car. ball. balloon. bee."
"""What is looked for."""
RATE, COUNT = 12, 60
_SCENE = resources.files("ovforge_video") / "scene"


def write_clip(path: Path) -> Path:
    """Write five seconds of H.264, 480x320, and return the path."""
    photo = _picture("photo.jpg").convert("RGB")
    things = {name: _picture(f"{name}.webp") for name in ("balloon", "car", "ball", "bee")}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height = photo.size
        stream.pix_fmt = "yuv420p"
        for number in range(COUNT):
            frame = photo.copy()
            for name, (x, y) in _places(number / COUNT).items():
                thing = things[name]
                frame.paste(thing, (round(x - thing.width / 2), round(y - thing.height / 2)), thing)
            made = av.VideoFrame.from_image(frame)
            made.pts, made.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    return path


def _places(part: float) -> dict[str, tuple[float, float]]:
    """Return the middle of each thing, in pixels, when a part (0..1) of the clip is over."""
    return {
        "balloon": (90 + 25 * math.sin(2 * math.pi * part), 260 - 190 * part),
        "car": (60 + 350 * part, 262),
        "ball": (410 - 240 * part, 130 - 70 * abs(math.sin(3 * math.pi * part))),
        "bee": (240 + 150 * math.cos(2 * math.pi * part), 190 + 60 * math.sin(4 * math.pi * part)),
    }


def _picture(name: str) -> Image.Image:
    with (_SCENE / name).open("rb") as file:
        picture = Image.open(file)
        picture.load()
    return picture
