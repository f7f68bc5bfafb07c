"""Boxes, numbers, trails and the time, drawn into frames."""

from __future__ import annotations

import colorsys
import functools
from collections import deque

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ovforge_video.frame import Frame
from ovforge_video.options import OverlayOptions

__all__ = ["Overlay"]

LOST = 2.0
"""Seconds that the trail of a thing stays after it was seen last."""
Colour = tuple[int, int, int]


class Overlay:
    """Draws the frames of one stream, in their order."""

    def __init__(self, options: OverlayOptions) -> None:
        self._options = options
        self._trails: dict[int, tuple[float, deque[tuple[float, float]]]] = {}
        self._last: tuple[Frame, NDArray[np.uint8]] | None = None

    def __call__(self, frame: Frame) -> NDArray[np.uint8]:
        """Return a copy of the frame's picture, RGB (height, width, 3), with what the options name drawn in.

        Several sinks of a stream share it: what is asked for twice is drawn once, and must not be changed.
        """
        if self._last is None or self._last[0] is not frame:
            self._last = frame, self._drawn(frame)
        return self._last[1]

    def _drawn(self, frame: Frame) -> NDArray[np.uint8]:
        assert frame.picture is not None
        options = self._options
        canvas = Image.fromarray(frame.picture)
        pen = ImageDraw.Draw(canvas)
        short = min(canvas.size)
        line, letters = max(1, round(short / 300)), max(10, round(short / 45))
        if options.trails:
            self._draw_trails(pen, frame, line)
        for n, label in enumerate(frame.labels):
            left, top, right, bottom = (float(value) for value in frame.boxes[n])
            number = int(frame.ids[n])
            colour = _colour(number or 1000 + int(frame.classes[n]))
            if options.boxes:
                pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
            words = [
                *([str(number)] if options.ids and number else []),
                *([label] if options.labels else []),
                *([f"{frame.scores[n]:.2f}"] if options.scores else []),
                *(frame.words[n].values() if options.details else []),
            ]
            if words:
                tile = _tile(" ".join(words)[:80], colour, letters)
                canvas.paste(tile, (round(left), max(0, round(top) - tile.height)))
        if options.time:
            canvas.paste(_tile(f"{frame.stream}  {frame.seconds:.2f} s", (0, 0, 0), letters), (0, 0))
        return np.asarray(canvas)

    def _draw_trails(self, pen: ImageDraw.ImageDraw, frame: Frame, line: int) -> None:
        for number, box in zip(frame.ids.tolist(), frame.boxes.tolist(), strict=True):
            if number:
                _, points = self._trails.get(number, (0.0, deque[tuple[float, float]](maxlen=self._options.trails)))
                points.append(((box[0] + box[2]) / 2, box[3]))
                self._trails[number] = (frame.seconds, points)
        old = [number for number, (seen, _) in self._trails.items() if frame.seconds - seen > LOST]
        for number in old:
            del self._trails[number]
        for number, (_, points) in self._trails.items():
            if len(points) > 1:
                pen.line(list(points), fill=_colour(number), width=line)


@functools.lru_cache(512)
def _colour(number: int) -> Colour:
    """Return a colour that white letters can be read on; near numbers differ much (golden angle)."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.36, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


@functools.lru_cache(512)
def _tile(text: str, colour: Colour, letters: int) -> Image.Image:
    """Return letters on a ground of a colour; drawing them anew for each frame would take longer than all the rest."""
    font = ImageFont.load_default(letters)
    edge = font.getbbox(text)
    tile = Image.new("RGB", (max(1, int(edge[2]) + 4), max(1, int(edge[3]) + 3)), colour)
    ImageDraw.Draw(tile).text((2, 1), text, fill="white", font=font)
    return tile
