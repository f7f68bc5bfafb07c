"""Train the autoencoder (Kingma and Welling 2013; as a first stage: Rombach et al. 2022).

A factor-4 encoder sees the picture at half size while the decoder makes it at full size: colour and shape appear in
minutes where a factor-8 encoder from scratch takes hours. `--stage encoder` then teaches the full-size encoder
to give the same latents, so that what ships is one standard AutoencoderKL; `--stage decoder` polishes the decoder.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from data import compose, draw_recipe, item_weights, load_objects, sheet
from models import autoencoder, restore, save, small_autoencoder
from torch.nn import functional


def loss_of(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error, at full size and pooled by 4 (which makes colour appear early), with some edges and L1."""
    pooled = functional.mse_loss(functional.avg_pool2d(made, 4), functional.avg_pool2d(wanted, 4))
    edges = functional.l1_loss(made.diff(dim=-1), wanted.diff(dim=-1)) + functional.l1_loss(
        made.diff(dim=-2), wanted.diff(dim=-2)
    )
    return functional.mse_loss(made, wanted) + pooled + 0.1 * functional.l1_loss(made, wanted) + 0.1 * edges


def main() -> None:
    """Train until `--minutes` are over; run again to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--stage", choices=("both", "encoder", "decoder"), default="both")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names, objects = load_objects(arguments.packages)
    weights = item_weights(names)
    full, half = autoencoder(), small_autoencoder()
    path = arguments.work / "vae.pt"
    done = 0
    if state := restore(path):
        full.load_state_dict(state["full"])
        half.load_state_dict(state["half"])
        done = state["done"]
    encoder = [*half.encoder.parameters(), *half.quant_conv.parameters()]
    decoder = [*full.decoder.parameters(), *full.post_quant_conv.parameters()]
    trained = {
        "both": [*encoder, *decoder],
        "encoder": [*full.encoder.parameters(), *full.quant_conv.parameters()],
        "decoder": decoder,
    }[arguments.stage]
    optimizer = torch.optim.AdamW(trained, lr=arguments.rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    start, step = time.monotonic(), 0
    rng = random.Random(done)

    def picture_batch(count: int) -> torch.Tensor:
        return compose([draw_recipe(rng, weights) for _ in range(count)], objects)

    while (passed := (time.monotonic() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                arguments.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * passed)) / 2)
            )
        pictures = picture_batch(arguments.batch)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(arguments.stage == "both"):
                coded = half.encode(functional.avg_pool2d(pictures, 2)).latent_dist
            if arguments.stage == "encoder":
                loss = functional.mse_loss(full.encode(pictures).latent_dist.mode().float(), coded.mode().float())
            else:
                made = full.decode(coded.sample()).sample.float()
                loss = loss_of(made, pictures)
                if arguments.stage == "both":
                    loss = loss + 2e-6 * coded.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"{step} {passed:.3f} loss {loss.item():.4f} {(time.monotonic() - start) / step:.2f} s", flush=True)
        if step % 200 == 0:
            save(path, full=full.state_dict(), half=half.state_dict(), done=done + step)
    save(path, full=full.state_dict(), half=half.state_dict(), done=done + step)
    with torch.no_grad():
        pictures = picture_batch(16)
        latents = half.encode(functional.avg_pool2d(pictures, 2)).latent_dist.mode()
        if arguments.stage == "encoder":
            latents = full.encode(pictures).latent_dist.mode()
        made = full.decode(latents).sample
    print(f"error {(made - pictures).pow(2).mean().item():.5f}, latent deviation {latents.std().item():.3f}")
    sheet(torch.cat([pictures[:8], made[:8], pictures[8:], made[8:]]), 8, arguments.work / f"vae-{arguments.stage}.png")


if __name__ == "__main__":
    main()
