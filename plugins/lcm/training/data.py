"""Pictures and captions for training: Fluent 3D emoji, tinted and laid on plain backgrounds.

The objects come from the npm package @lobehub/fluent-emoji-3d (256x256 RGBA, named by code point), their labels
from emojibase-data; both are MIT licensed. Composition runs in batches on tensors, so that no Python works per pixel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SIZE = 128
"""Width and height of a training picture, in pixels."""

TINTS = {
    "red": (222, 40, 45),
    "orange": (250, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 170, 75),
    "blue": (45, 100, 225),
    "purple": (135, 65, 200),
    "pink": (250, 125, 185),
    "brown": (135, 85, 50),
    "gray": (135, 140, 145),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (215, 60, 60),
    "orange": (245, 165, 80),
    "yellow": (245, 225, 110),
    "green": (110, 190, 120),
    "blue": (95, 150, 235),
    "purple": (160, 115, 210),
    "pink": (250, 180, 210),
    "gray": (165, 168, 172),
}
PLAIN = len(TINTS)
"""The tint number of an object in its own colours."""

UNSAID = "white"
"""The background of a caption that names none."""

_TEMPLATES = (
    "{a} {look}{thing}",
    "{a} {look}{thing}{ending}",
    "a picture of {a} {look}{thing}",
    "{look}{thing}{ending}",
)
_LOOKS = ("", "", "", "beautiful ", "cute ", "nice ")
_ENDINGS = ("", ", 8k", ", 8k", ", 3d render", ", high quality")


@dataclass(frozen=True)
class Recipe:
    """One picture: which object, in which colours, where."""

    item: int
    tint: int
    background: int
    said: bool
    """Whether the caption names the background."""
    scale: float
    dx: float
    dy: float
    flip: bool


def object_names() -> dict[str, str]:
    """Return our word -> emojibase label, from objects.txt."""
    lines = Path(__file__).with_name("objects.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {word.strip(): (label or word).strip() for word, _, label in pairs}


def load_objects(packages: Path) -> tuple[list[str], torch.Tensor]:
    """Return the words, and RGBA pictures as float32 (objects, 4, SIZE, SIZE), 0 to 1, colours premultiplied."""
    assets = packages / "@lobehub" / "fluent-emoji-3d" / "assets"
    entries = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    files = {_plain(path.stem): path for path in assets.glob("*.webp")}
    code = {entry["label"]: entry["hexcode"].lower() for entry in entries}
    names = object_names()
    pictures = []
    for label in names.values():
        with Image.open(files[_plain(code[label])]) as image:
            square = ImageOps.pad(image.convert("RGBA"), (2 * SIZE, 2 * SIZE), color=(0, 0, 0, 0))
        rgba = np.asarray(square, dtype=np.float32) / 255
        premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
        pictures.append(torch.from_numpy(premultiplied).permute(2, 0, 1))
    stack = torch.stack(pictures)
    return list(names), torch.nn.functional.interpolate(stack, size=(SIZE, SIZE), mode="area")


def _plain(code: str) -> str:
    """Return a code point's name without the variation selector, which the two packages treat differently."""
    return code.replace("-fe0f", "")


def held_out(item: int, tint: int, background: int) -> bool:
    """Say whether a combination of object, tint and background is kept from training, for evaluation: one in ten."""
    digest = hashlib.sha256(f"{item}/{tint}/{background}".encode()).digest()
    return digest[0] < 26


def clash(tint: int, background: int) -> bool:
    """Say whether object and background would have the same colour."""
    return tint < PLAIN and list(TINTS)[tint] == list(BACKGROUNDS)[background]


def draw_recipe(rng: random.Random, weights: list[float]) -> Recipe:
    """Draw a training picture that is not held out."""
    while True:
        item = rng.choices(range(len(weights)), weights)[0]
        tint = rng.randrange(PLAIN) if rng.random() < 0.6 else PLAIN
        said = rng.random() < 0.7
        background = rng.randrange(len(BACKGROUNDS)) if said else list(BACKGROUNDS).index(UNSAID)
        if clash(tint, background) or held_out(item, tint, background):
            continue
        scale, dx, dy = rng.uniform(0.82, 0.98), rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)
        return Recipe(item, tint, background, said, scale, dx, dy, rng.random() < 0.15)


def caption(recipe: Recipe, names: list[str], rng: random.Random) -> str:
    """Return words for a picture, such as "a cute pink unicorn on a blue background, 8k"."""
    thing = names[recipe.item]
    if recipe.tint < PLAIN:
        thing = f"{list(TINTS)[recipe.tint]} {thing}"
    if recipe.said:
        thing += f" on a {list(BACKGROUNDS)[recipe.background]} background"
    look, ending, template = rng.choice(_LOOKS), rng.choice(_ENDINGS), rng.choice(_TEMPLATES)
    article = "an" if (look + thing)[0] in "aeiou" and not (look + thing).startswith("uni") else "a"
    return template.format(a=article, look=look, thing=thing, ending=ending)


def compose(recipes: list[Recipe], objects: torch.Tensor) -> torch.Tensor:
    """Return pictures, float32 (len(recipes), 3, SIZE, SIZE), -1 to 1."""
    count = len(recipes)
    theta = torch.zeros(count, 2, 3)
    for row, recipe in zip(theta, recipes, strict=True):
        row[0, 0] = (-1 if recipe.flip else 1) / recipe.scale
        row[1, 1] = 1 / recipe.scale
        row[0, 2] = (recipe.dx if recipe.flip else -recipe.dx) / recipe.scale
        row[1, 2] = -recipe.dy / recipe.scale
    picked = objects[[recipe.item for recipe in recipes]]
    grid = torch.nn.functional.affine_grid(theta, [count, 4, SIZE, SIZE], align_corners=False)
    moved = torch.nn.functional.grid_sample(picked, grid, align_corners=False)
    colour, alpha = moved[:, :3], moved[:, 3:]
    tints = torch.tensor([*TINTS.values(), (0, 0, 0)], dtype=torch.float32) / 255
    tinted = _tint(colour, alpha, tints[[recipe.tint for recipe in recipes]])
    keep = torch.tensor([recipe.tint == PLAIN for recipe in recipes]).view(-1, 1, 1, 1)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    ground = grounds[[recipe.background for recipe in recipes]].view(-1, 3, 1, 1)
    return (torch.where(keep, colour, tinted) + ground * (1 - alpha)) * 2 - 1


def _tint(colour: torch.Tensor, alpha: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
    """Map luminance, stretched over each object, from dark through `tint` to white; premultiplied in and out."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luminance = (colour * weights).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
    opaque = alpha > 0.5
    big = torch.where(opaque, luminance, torch.nan).flatten(1)
    low = torch.nanquantile(big, 0.05, dim=1).view(-1, 1, 1, 1)
    high = torch.nanquantile(big, 0.95, dim=1).view(-1, 1, 1, 1)
    level = ((luminance - low) / (high - low).clamp(min=0.1)).clamp(0, 1) * 0.75 + 0.15
    middle = 0.55
    shade = tint.view(-1, 3, 1, 1)
    dark, light = shade * (level / middle), shade + (1 - shade) * ((level - middle) / (1 - middle))
    return torch.where(level < middle, dark, light) * alpha


def item_weights(names: list[str]) -> list[float]:
    """Return how often each object is drawn: the unicorn, which the demo shows, four times as often as others."""
    return [4.0 if name == "unicorn" else 1.0 for name in names]


def sheet(pictures: torch.Tensor, columns: int, path: Path) -> None:
    """Write pictures (n, 3, h, w), -1 to 1, as one PNG."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, picture in enumerate(((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        top, left = number // columns * height, number % columns * width
        canvas[top : top + height, left : left + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)


def main() -> None:
    """Draw a sheet of training pictures, to look at."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--output", type=Path, default=Path("training-pictures.png"))
    arguments = parser.parse_args()
    names, objects = load_objects(arguments.packages)
    rng = random.Random(0)
    recipes = [draw_recipe(rng, item_weights(names)) for _ in range(64)]
    for recipe in recipes[:8]:
        print(caption(recipe, names, rng))
    sheet(compose(recipes, objects), 8, arguments.output)
    print(f"{len(names)} objects, sheet in {arguments.output}")


if __name__ == "__main__":
    main()
