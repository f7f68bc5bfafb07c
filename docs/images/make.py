"""Makes the pictures of the docs with the embedded models: python docs/images/make.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

import ovforge
from ovforge.model.sources import package_path

HERE = Path(__file__).parent
MODEL = "package:ovforge_lcm/model"


def strip(images: Sequence[Image.Image], name: str, gap: int = 4) -> None:
    """Save pictures of one size side by side."""
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * (width + gap) - gap, height), "silver")
    for number, image in enumerate(images):
        row.paste(image.convert("RGB"), (number * (width + gap), 0))
    row.save(HERE / name)


def main() -> None:
    """Make one strip for each task."""
    text = ovforge.Pipeline("text-to-image", source=MODEL)
    prompts = {
        "a beautiful pink unicorn, 8k": 1234567,
        "a green dragon on a yellow background": 2,
        "a blue fish on a white background": 1,
        "a yellow duck": 2,
    }
    strip([text(prompt, seed=seed).images[0] for prompt, seed in prompts.items()], "text-to-image.png")

    car = text("a red car on a white background", seed=3).images[0]
    change = ovforge.Pipeline("image-to-image", source=MODEL)
    blue = "a blue car on a yellow background"
    strip(
        [car, *(change(blue, image=car, strength=s, steps=4, seed=5).images[0] for s in (0.3, 0.5, 0.7, 0.9))],
        "image-to-image.png",
    )

    paint = ovforge.Pipeline("inpainting", source=MODEL)
    made = [car]
    for box in ((64, 0, 127, 127), (6, 20, 122, 120)):
        mask = Image.new("L", car.size, 0)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        inputs = {"image": car, "mask": mask, "strength": 0.75, "steps": 6, "seed": 2, "paste": True}
        made += [mask, paint("a blue car on a white background", **inputs).images[0]]
    strip(made, "inpainting.png")

    detect = ovforge.Pipeline("detect", source="package:ovforge_grounding_dino/model")
    scene = package_path("package:ovforge_grounding_dino/demo/scene.jpg")
    detect(scene, text="horse. tree. cloud. sun. house. car. dog. balloon.").save(HERE / "detect.png")


if __name__ == "__main__":
    main()
