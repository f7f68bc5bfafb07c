"""Teach the embedded model a colour that it has no word for (Gal et al. 2022), and measure what it learned.

The embedded model knows nine colours. One vector of its text encoder's input is trained to name a tenth, teal: on most
of its objects, and measured on the others. Everything else of the model stays as it is.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer

import ovforge

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2] / "lcm" / "training"))

import data  # noqa: E402  the generator of the embedded model's own pictures
from diffusion import Noise, guidance_embedding  # noqa: E402
from distill_lcm import GRID, boundary  # noqa: E402

MODEL = HERE.parents[2] / "lcm" / "tests" / "data" / "embedded-diffusers"
WORD = "<teal>"
COLOUR = (15, 160, 160)
STARTS_AS = "blue"
TABLE = "embeddings.token_embedding.weight"
KEPT_BACK = (
    "unicorn",
    "car",
    "cat",
    "mushroom",
    "rocket",
    "dragon",
    "teddy bear",
    "guitar",
    "house",
    "owl",
    "star",
    "gift",
)
"""Objects that are never shown in the new colour while it is learned."""
SHOWN = ("unicorn", "car", "cat", "mushroom", "rocket", "dragon")


class Model:
    """The embedded model in torch, frozen, with one more row in its table of embeddings."""

    def __init__(self) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        self.words = CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().requires_grad_(False).eval()
        self.unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().requires_grad_(False).eval()
        self.autoencoder = AutoencoderKL.from_pretrained(MODEL / "vae").float().requires_grad_(False).eval()
        self.tokenizer.add_tokens(WORD)
        self.table = self.words.get_parameter(TABLE).clone()
        self.noise = Noise()

    def start(self) -> torch.Tensor:
        """Return the row of the word that the new one starts as."""
        [number] = self.tokenizer(STARTS_AS, add_special_tokens=False).input_ids
        return self.table[number].clone().requires_grad_(True)

    def states(self, captions: list[str], row: torch.Tensor) -> torch.Tensor:
        """Return what the UNet sees of captions, the new word meaning `row`."""
        text = self.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        table = torch.cat([self.table, row[None]])
        return functional_call(self.words, {TABLE: table}, (text.input_ids,)).last_hidden_state

    def clean(self, noisy: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, scale: torch.Tensor):
        """Return the consistency function: clean latents from noisy ones."""
        guided = guidance_embedding(scale - 1, self.unet.config.time_cond_proj_dim)
        velocity = self.unet(noisy, timestep, states, timestep_cond=guided).sample
        skip, out = boundary(timestep)
        return skip * noisy + out * self.noise.clean(velocity, noisy, timestep)

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the latents of pictures."""
        return self.autoencoder.encode(pictures).latent_dist.mode() * self.autoencoder.config.scaling_factor


def new_colour() -> None:
    """Put the new colour instead of the generator's first one, captions and all."""
    data.TINTS = {WORD: COLOUR, **dict(list(data.TINTS.items())[1:])}


def train(model: Model, packages: Path, steps: int, batch: int, rate: float) -> torch.Tensor:
    """Return the row that was learned."""
    names, objects = data.load_objects(packages)
    new_colour()
    rng = random.Random(0)
    weights = [0.0 if name in KEPT_BACK else 1.0 for name in names]
    row = model.start()
    optimizer = torch.optim.AdamW([row], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    grid = torch.arange(1, GRID + 1) * (1000 // GRID) - 1
    start = time.monotonic()
    for step in range(1, steps + 1):
        recipes = [replace(data.draw_recipe(rng, weights), tint=0) for _ in range(batch)]
        captions = [data.caption(recipe, names, rng) for recipe in recipes]
        with torch.no_grad():
            wanted = model.latents(data.compose(recipes, objects))
        # High noise, where the colour is decided.
        timestep = grid[torch.randint(GRID // 2, GRID, (batch,))]
        noisy = model.noise.add(wanted, torch.randn_like(wanted), timestep)
        made = model.clean(noisy, timestep, model.states(captions, row), 1 + 4 * torch.rand(batch))
        loss = (made - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            length = row.detach().norm().item()
            print(f"{step} loss {loss.item():.4f} length {length:.3f} {time.monotonic() - start:.0f} s", flush=True)
    return row.detach()


def with_word(file: Path) -> Any:
    """Return the shipped model that has learned the word."""
    return ovforge.Pipeline(
        "text-to-image",
        source="package:ovforge_lcm/model",
        transforms=[ovforge.Use("textual-inversion", path=str(file))],
    )


def measure(file: Path, packages: Path) -> dict[str, dict[str, int]]:
    """Return what objects that were never shown in teal look like: pictures by the colour nearest to theirs, of ten.

    First with the new word, then with the plain text "teal". Four seeds for each object.
    """
    names, objects = data.load_objects(packages)
    colours = {"teal": COLOUR, **data.TINTS}
    tints = torch.tensor(list(colours.values()), dtype=torch.float32)
    pipe = with_word(file)
    found: dict[str, dict[str, int]] = {}
    for word in (WORD, "teal"):
        counts: Counter[str] = Counter()
        for name in KEPT_BACK:
            mask = objects[names.index(name), 3] > 0.9
            for seed in range(4):
                image = pipe(f"a {word} {name} on a white background", seed=seed).images[0]
                pixels = torch.from_numpy(np.array(image))[mask].float()
                shaded = pixels[pixels.min(dim=1).values < 200]
                # By hue and saturation: how light an object is, is its own.
                colour = _chroma(shaded.median(dim=0).values[None])
                counts[list(colours)[int((_chroma(tints) - colour).norm(dim=1).argmin())]] += 1
        found[word] = dict(counts.most_common())
    return found


def _chroma(colours: torch.Tensor) -> torch.Tensor:
    """Return colours without their lightness, as parts of their largest channel."""
    parts = colours / colours.max(dim=1, keepdim=True).values
    return parts - parts.mean(dim=1, keepdim=True)


def draw(file: Path, target: Path) -> None:
    """Write the picture of the docs: the same prompts and seeds before the word was learned, and after."""
    before = ovforge.Pipeline("text-to-image", source="package:ovforge_lcm/model")
    rows = [[pipe(f"a {WORD} {name}", seed=3).images[0] for name in SHOWN] for pipe in (before, with_word(file))]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(SHOWN) * (width + 4) - 4, 2 * (height + 4) - 4), "silver")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            sheet.paste(image, (left * (width + 4), top * (height + 4)))
    sheet.save(target)


def main() -> None:
    """Train, write the file, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules, see plugins/lcm/training")
    parser.add_argument(
        "--output", type=Path, default=HERE.parents[1] / "src/ovforge_textual_inversion/teal.safetensors"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--measure", action="store_true", help="measure the file that is there")
    parser.add_argument("--picture", type=Path, help="draw the picture of the docs with the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.measure:
        print(json.dumps(measure(arguments.output, arguments.packages)))
    elif arguments.picture:
        draw(arguments.output, arguments.picture)
    else:
        row = train(Model(), arguments.packages, arguments.steps, arguments.batch, arguments.rate)
        save_file({WORD: row[None].contiguous()}, arguments.output)


if __name__ == "__main__":
    main()
