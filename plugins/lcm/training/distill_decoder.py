"""Distil a tiny decoder (AutoencoderTiny's, after TAESD by Bohan) from the embedded model's own.

It learns from what the model makes: latents of prompts, and the pictures that the autoencoder's decoder makes of them.
`--stage draw` makes them with ovforge and goes on where it stopped; `--stage train` trains for `--minutes` and writes a
diffusers folder; `--stage score` compares a decoder with the other on prompts that training has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, TINTS, object_names
from diffusers import AutoencoderTiny
from models import restore, save
from torch.nn import functional

import ovforge

BATCH = 16
"""Pictures that the pipeline makes at a time, and that a step of training sees."""

WIDTH, BLOCKS = 24, (4, 4, 2, 0)
"""Channels, and residual blocks at 16x16, 32x32, 64x64 and 128x128: a quarter of the other decoder's work."""

_FIRST_HELD_OUT = 10**6
"""Prompts and seeds from this number on judge, and are never drawn for training."""


def prompt(number: int) -> str:
    """Return prompt `number`, in the words of training."""
    rng = random.Random(number)
    tint, back = rng.choice(["", *TINTS]), rng.choice(list(BACKGROUNDS))
    return f"a {tint} {rng.choice(list(object_names()))} on a {back} background".replace("  ", " ")


def drawn(model: str, first: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (latents, pictures) of prompts from `first` on: float32 (BATCH, 4, 16, 16), uint8 (BATCH, 128, 128, 3)."""
    pipe = ovforge.Pipeline("text-to-image", source=model, device=ovforge.Use("cpu", precision="f32"))
    for start in range(first, first + count, BATCH):
        result = pipe([prompt(number) for number in range(start, start + BATCH)], seed=start, steps=4)
        yield result.latents, np.stack([np.asarray(image) for image in result.images])


def draw(model: str, folder: Path, count: int) -> None:
    """Write what the model makes, a file a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    done = len(list(folder.glob("*.npz")))
    for number, (latents, pictures) in enumerate(drawn(model, done * BATCH, count - done * BATCH), start=done):
        temporary = folder / "part.tmp"
        with temporary.open("wb") as file:
            np.savez(file, latents=latents, pictures=pictures)
        temporary.rename(folder / f"{number:05}.npz")


def tiny() -> AutoencoderTiny:
    """Return the autoencoder; its encoder is as small as the class allows, since the decoder alone ships."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=BLOCKS,
        latent_channels=4,
        scaling_factor=1.0,
    )


def loss_of(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1, at full size and at a quarter, and of edges: what structural similarity looks at."""
    pooled = functional.l1_loss(functional.avg_pool2d(made, 4), functional.avg_pool2d(wanted, 4))
    edges = functional.l1_loss(made.diff(dim=-1), wanted.diff(dim=-1)) + functional.l1_loss(
        made.diff(dim=-2), wanted.diff(dim=-2)
    )
    return functional.l1_loss(made, wanted) + 0.5 * pooled + 0.5 * edges


def train(folder: Path, work: Path, minutes: float, rate: float) -> None:
    """Train until the processor time is over, and write the diffusers folder `work`/tiny. Run again to go on."""
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    latents = torch.from_numpy(np.concatenate([file["latents"] for file in files]))
    pictures = torch.from_numpy(np.concatenate([file["pictures"] for file in files])).permute(0, 3, 1, 2)
    model = tiny()
    state, done = restore(work / "tiny.pt"), 0
    if state:
        model.load_state_dict(state["model"])
        done = state["done"]
    decoder = model.decoder
    average = {name: value.clone() for name, value in decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-5)
    start, step = time.process_time(), 0
    chooser = torch.Generator().manual_seed(done)
    while (passed := (time.process_time() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * passed)) / 2)
        rows = torch.randint(len(latents), (BATCH,), generator=chooser)
        wanted = pictures[rows].float() / 127.5 - 1
        made = model.decode(latents[rows]).sample
        loss = loss_of(made, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.99, step / (step + 10))
        for name, value in decoder.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if step % 50 == 0:
            took = (time.process_time() - start) / step
            print(f"{done + step} {passed:.3f} loss {loss.item():.4f} {took:.2f} s", flush=True)
    decoder.load_state_dict(average)
    save(work / "tiny.pt", model=model.state_dict(), done=done + step)
    model.save_pretrained(work / "tiny")


def score(model: str, decoder: str, count: int) -> None:
    """Print how close pictures by a decoder come to those by the model's own: SSIM, GMSD's complement, PSNR."""
    pipe = ovforge.Pipeline(
        "text-to-image",
        source=model,
        load={"parts": {"vae_decoder": decoder}},
        device=ovforge.Use("cpu", precision="f32"),
    )
    scores: dict[str, list[float]] = {"ssim": [], "gmsd": [], "psnr": []}
    plain = ovforge.Pipeline("text-to-image", source=model, device=ovforge.Use("cpu", precision="f32"))
    for number in itertools.islice(itertools.count(_FIRST_HELD_OUT), count):
        ours, theirs = (each(prompt(number), seed=number, steps=4) for each in (pipe, plain))
        for name, values in scores.items():
            values.append(ours.compare(theirs, name))
    print(json.dumps({name: round(sum(values) / count, 4) for name, values in scores.items()}))


def main() -> None:
    """Do one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="package:ovforge_lcm/model")
    parser.add_argument("--stage", choices=["draw", "train", "score"], required=True)
    parser.add_argument("--count", type=int, default=1600, help="pictures to draw, or to score with")
    parser.add_argument("--minutes", type=float, default=15, help="of processor time, which others do not take from it")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decoder", default="", help="the OpenVINO folder that score judges")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.stage == "draw":
        draw(arguments.model, arguments.work / "drawn", arguments.count)
    elif arguments.stage == "train":
        train(arguments.work / "drawn", arguments.work, arguments.minutes, arguments.rate)
    else:
        score(arguments.model, arguments.decoder, arguments.count)


if __name__ == "__main__":
    main()
