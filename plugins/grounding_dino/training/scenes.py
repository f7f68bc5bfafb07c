"""Scenes for training: Fluent 3D emoji on varied backgrounds, overlapping, in many sizes, with their boxes.

The objects come from the npm package @lobehub/fluent-emoji-3d (256x256 RGBA, named by code point), their labels from
emojibase-data; both are MIT licensed.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

SIZE = 128
"""Width and height of a stored object, in pixels."""

VISIBLE = 0.4
"""Of an object's area: with less of it to be seen, it is none."""

Array = np.ndarray


@dataclass(frozen=True)
class Thing:
    """A class of objects."""

    word: str
    labels: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (height, width, 3), boxes float32 (n, 4) as x1, y1, x2, y2 in pixels, and their classes."""

    picture: Array
    boxes: Array
    classes: list[int]


def read_things() -> list[Thing]:
    """Return the classes of objects.txt."""
    found = []
    for line in Path(__file__).with_name("objects.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w ]+?)(?: = ([\w ,]+?))?(?: \(([\w, ]+)\))?", line)
        assert match, line
        word, labels, kinds = match.groups()
        found.append(Thing(word, tuple((labels or word).split(", ")), tuple(kinds.split(", ")) if kinds else ()))
    return found


class Objects:
    """Pictures of objects, premultiplied float32 (SIZE, SIZE, 4), 0 to 1: of the classes, and others that distract."""

    def __init__(self, packages: Path, things: list[Thing]) -> None:
        entries = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
        assets = packages / "@lobehub" / "fluent-emoji-3d" / "assets"
        files = {path.stem.replace("-fe0f", ""): path for path in assets.glob("*.webp")}
        codes = {entry["label"]: entry["hexcode"].lower().replace("-fe0f", "") for entry in entries}
        self.known = [[_read(files[codes[label]]) for label in thing.labels] for thing in things]
        taken = {label for thing in things for label in thing.labels}
        stems = {thing.word for thing in things} | {label for thing in things for label in thing.labels}
        groups = {3, 4, 5, 6}  # animals and nature, food and drink, travel and places, activities
        self.others = [
            _read(files[codes[entry["label"]]])
            for entry in entries
            if entry.get("group") in groups | {7}
            and entry["label"] not in taken
            and codes[entry["label"]] in files
            and not any(stem in entry["label"].lower() for stem in stems)
        ]


def _read(path: Path) -> Array:
    with Image.open(path) as image:
        square = ImageOps.pad(image.convert("RGBA"), (2 * SIZE, 2 * SIZE), color=(0, 0, 0, 0))
    rgba = np.asarray(square, np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return cv2.resize(rgba, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


# -- backgrounds --------------------------------------------------------------------------------------------------


def background(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a background, float32 (height, width, 3), 0 to 1."""
    kind = rng.choice([_gradient, _noise, _pattern, _landscape], p=[0.25, 0.3, 0.15, 0.3])
    made: Array = kind(rng, height, width)
    return made.clip(0, 1)


def _colour(rng: np.random.Generator) -> Array:
    return rng.uniform(0, 1, 3) if rng.random() < 0.7 else np.full(3, rng.uniform(0, 1))


def _gradient(rng: np.random.Generator, height: int, width: int) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * x / width + np.sin(angle) * y / height
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    first = _colour(rng)
    second = _colour(rng) if rng.random() < 0.7 else first
    return (first + (second - first) * ramp[..., None]).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int) -> Array:
    total = np.zeros((height, width, 3), np.float32) + _colour(rng).astype(np.float32)
    strength = rng.uniform(0.1, 0.6)
    for cells in (3, 6, 12, 24, 48):
        if rng.random() < 0.7:
            grid = rng.normal(0, 1, (cells, cells, rng.choice([1, 3]))).astype(np.float32)
            layer = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
            total += strength * (layer if layer.ndim == 3 else layer[..., None])
        strength *= 0.6
    return total


def _pattern(rng: np.random.Generator, height: int, width: int) -> Array:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = np.sin(2 * np.pi * along / period)
    if rng.random() < 0.5:
        wave = wave * np.sin(2 * np.pi * across / period)
    if rng.random() < 0.5:
        wave = np.sign(wave)
    first, second = _colour(rng), _colour(rng)
    return (first + (second - first) * (0.5 + 0.5 * wave[..., None])).astype(np.float32)


def _landscape(rng: np.random.Generator, height: int, width: int) -> Array:
    """Sky, and hills before each other."""
    sky = np.array([0.45, 0.7, 0.95]) + rng.normal(0, 0.12, 3)
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    scene = (sky + (1 - sky) * 0.7 * ramp * np.ones((1, width, 1))).astype(np.float32)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    level = rng.uniform(0.35, 0.7)
    ground = np.array([0.3, 0.6, 0.25]) + rng.normal(0, 0.15, 3)
    for _ in range(rng.integers(1, 4)):
        waves = sum(
            rng.uniform(0.01, 0.06) * np.sin(2 * np.pi * (columns / width * rng.uniform(0.5, 3) + rng.random()))
            for _ in range(2)
        )
        hill = rows > (level + waves) * height
        scene[hill] = ground.clip(0.05, 0.95)
        ground, level = ground * rng.uniform(0.75, 1.1), level + rng.uniform(0.08, 0.2)
    grain = cv2.resize(rng.normal(0, 0.03, (height // 4, width // 4)).astype(np.float32), (width, height))
    return scene + grain[..., None]


# -- scenes -------------------------------------------------------------------------------------------------------


def compose(rng: np.random.Generator, objects: Objects, height: int = 256, width: int = 256, most: int = 9) -> Scene:
    """Draw a scene: up to `most` objects of the classes, up to three others, the later before the earlier.

    In two scenes of five, half of the objects are of a class that is there already: a model that never sees two of a
    class learns to find one.
    """
    canvas = background(rng, height, width)
    count, others = int(rng.integers(1, most + 1)), int(rng.integers(0, 4))
    kinds, again = list[int](), 0.5 * (rng.random() < 0.4)
    for _ in range(count):
        repeated = bool(kinds) and rng.random() < again
        kinds.append(int(rng.choice(kinds)) if repeated else int(rng.integers(len(objects.known))))
    kinds += [-1] * others
    rng.shuffle(kinds)
    short = min(height, width)
    placed: list[tuple[int, Array, Array, int]] = []  # class, box, visible part, whole area
    for kind in kinds:
        pictures = objects.others if kind < 0 else objects.known[kind]
        sprite = pictures[rng.integers(len(pictures))]
        side = short * np.exp(rng.uniform(np.log(0.13), np.log(0.55)))
        for _ in range(8):  # a place that hides little of the others
            layer, rows, columns = _place(rng, sprite, side, height, width)
            alpha = layer[..., 3] > 0.5
            hides = any((alpha & seen[rows, columns]).sum() > (1 - VISIBLE) * area for _, _, seen, area in placed)
            if alpha.sum() > 0.17 * side * side and not hides:
                break
            side *= 0.92
        else:
            continue
        for *_, seen, _area in placed:
            seen[rows, columns] &= ~alpha
        canvas[rows, columns] = canvas[rows, columns] * (1 - layer[..., 3:]) + layer[..., :3]
        whole = np.zeros((height, width), bool)
        whole[rows, columns] = alpha
        placed.append((kind, _box(whole), whole, int(alpha.sum())))
    kept = [(kind, box) for kind, box, seen, area in placed if kind >= 0 and seen.sum() >= VISIBLE * area]
    picture = _camera(rng, canvas)
    boxes = np.array([box for _, box in kept], np.float32).reshape(-1, 4)
    return Scene(picture, boxes, [kind for kind, _ in kept])


def _place(rng: np.random.Generator, sprite: Array, side: float, height: int, width: int) -> tuple[Array, slice, slice]:
    """Return the sprite turned, scaled, flipped, its colours a little changed, and the rows and columns it covers."""
    margin = 0.35 * side
    x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    angle = rng.normal(0, 10) if rng.random() < 0.7 else rng.uniform(-40, 40)
    if side < SIZE / 2:  # smaller first: or else pixels are skipped
        sprite = cv2.resize(sprite, (SIZE // 2, SIZE // 2), interpolation=cv2.INTER_AREA)
    own = sprite.shape[0] / 2
    matrix = cv2.getRotationMatrix2D((own, own), angle, side / 2 / own)
    matrix[0] *= np.exp(rng.normal(0, 0.07)) * (-1 if rng.random() < 0.5 else 1)
    reach = 0.75 * side
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    matrix[:, 2] += np.array([x - left, y - top]) - matrix @ np.array([own, own, 1])
    layer = cv2.warpAffine(sprite, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    gain = np.exp(rng.normal(0, 0.12)) * np.exp(rng.normal(0, 0.05, 3))
    layer[..., :3] = np.minimum(layer[..., :3] * gain.astype(np.float32), layer[..., 3:])
    return layer, slice(top, bottom), slice(left, right)


def _box(alpha: Array) -> Array:
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _camera(rng: np.random.Generator, canvas: Array) -> Array:
    """Blur and noise."""
    if rng.random() < 0.2:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < 0.4:
        canvas = canvas + rng.normal(0, rng.uniform(0.005, 0.04), canvas.shape[:2])[..., None]
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def main() -> None:
    """Draw a sheet of training scenes with their boxes, to look at."""
    import time

    import supervision

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--output", type=Path, default=Path("scenes.png"))
    arguments = parser.parse_args()
    things = read_things()
    objects = Objects(arguments.packages, things)
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    scenes = [compose(rng, objects) for _ in range(16)]
    took = (time.perf_counter() - start) / len(scenes)
    print(f"{len(things)} classes, {len(objects.others)} others, {1000 * took:.1f} ms a scene")
    sheet = np.zeros((1024, 1024, 3), np.uint8)
    for number, scene in enumerate(scenes):
        found = supervision.Detections(xyxy=scene.boxes, class_id=np.array(scene.classes, int))
        drawn = supervision.BoxAnnotator(thickness=1).annotate(scene.picture.copy(), found)
        labels = [things[kind].word for kind in scene.classes]
        drawn = supervision.LabelAnnotator(text_scale=0.3, text_padding=1).annotate(drawn, found, labels)
        row, column = divmod(number, 4)
        sheet[row * 256 : row * 256 + 256, column * 256 : column * 256 + 256] = drawn
    Image.fromarray(sheet).save(arguments.output)


if __name__ == "__main__":
    main()
