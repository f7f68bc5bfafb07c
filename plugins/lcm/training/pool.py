"""Encode a pool of training pictures once: latents, captions' token numbers, recipes."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from data import caption, compose, draw_recipe, item_weights, load_objects
from models import restore, save, small_autoencoder
from tokenizer import LENGTH
from torch.nn import functional
from transformers import CLIPTokenizer

CAPTIONS = 3
"""Captions for each picture."""


@torch.no_grad()
def main() -> None:
    """Write work/pool.pt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    names, objects = load_objects(arguments.packages)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    encoder = small_autoencoder().eval()
    state = restore(arguments.work / "vae.pt")
    assert state is not None, "train the autoencoder first"
    encoder.load_state_dict(state["half"])
    rng = random.Random(arguments.seed)
    latents, tokens = [], []
    weights = item_weights(names)
    while len(latents) * 64 < arguments.count:
        recipes = [draw_recipe(rng, weights) for _ in range(64)]
        with torch.autocast("cpu", torch.bfloat16):
            coded = encoder.encode(functional.avg_pool2d(compose(recipes, objects), 2)).latent_dist.mode()
        latents.append(coded.half())
        texts = [caption(recipe, names, rng) for recipe in recipes for _ in range(CAPTIONS)]
        numbers = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        tokens.append(numbers.input_ids.view(64, CAPTIONS, LENGTH).short())
    pool = torch.cat(latents)
    scale = 1 / pool.float().std().item()
    empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids.short()
    save(arguments.work / "pool.pt", latents=pool, tokens=torch.cat(tokens), empty=empty, scale=scale)
    print(f"{len(pool)} latents, scaling factor {scale:.4f}")


if __name__ == "__main__":
    main()
