"""Draw the same prompts and seeds without and with an adapter, one row each.

python before_after.py ../src/ovforge_sd_lora/examples/pencil.safetensors ../../../docs/images/lora.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import ovforge
from ovforge import Use

PROMPTS = {
    7: "a cute pink unicorn on a blue background, 8k",
    8: "a green dragon on a yellow background",
    9: "a red apple on a white background",
    10: "a cat on a purple background",
    3: "a blue car on a white background",
    4: "a penguin on a green background",
}
SIDE = 128


def main(adapter: Path, target: Path) -> None:
    """Write the picture."""
    lora = Use("lora", path=adapter, name="pencil", mode="runtime")
    pipe = ovforge.Pipeline("text-to-image", "package:ovforge_lcm/model", scheduler="lcm", transforms=[lora])
    sheet = Image.new("RGB", (SIDE * len(PROMPTS), 2 * SIDE))
    for row, weight in enumerate((0.0, 1.0)):
        pipe.adapters.set({"pencil": weight})
        for column, (seed, prompt) in enumerate(PROMPTS.items()):
            sheet.paste(pipe(prompt, steps=4, seed=seed).images[0], (SIDE * column, SIDE * row))
    sheet.save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
