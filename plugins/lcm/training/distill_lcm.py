"""Distil the diffusion model into a latent consistency model (Luo et al. 2023, algorithm 1).

The student starts as the teacher, with an embedding of the guidance scale added. At each step it must give the same
clean latents from two neighbouring points of the teacher's guided DDIM path.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from data import sheet
from diffusers.models.attention_processor import AttnProcessor
from diffusion import STEPS, Noise, averaged, follow, guidance_embedding
from models import GUIDANCE_WIDTH, autoencoder, restore, save, text_encoder, unet
from tokenizer import LENGTH
from train_unet import PROMPTS
from transformers import CLIPTokenizer

GRID = 50
"""Timesteps of the paths: those that LCMScheduler picks from (its original_inference_steps)."""

JUMP = 2
"""How many of them a training pair lies apart."""

SIGMA_DATA, SCALING = 0.5, 10.0


def boundary(timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c_skip and c_out as LCMScheduler computes them, shaped (batch, 1, 1, 1)."""
    scaled = timestep.float().view(-1, 1, 1, 1) * SCALING
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2).sqrt()


def consistent(model, noise: Noise, noisy, timestep, states, guided) -> torch.Tensor:
    """Return the consistency function: clean latents from noisy ones."""
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, timestep, states, timestep_cond=guided).sample.float()
    skip, out = boundary(timestep)
    return skip * noisy + out * noise.clean(velocity, noisy, timestep)


@torch.no_grad()
def sample(model, words, tokens, guidance: float, steps: int = 4, seed: int = 1234567) -> torch.Tensor:
    """Return latents as LCMScheduler samples them."""
    noise, generator = Noise(), torch.Generator().manual_seed(seed)
    states = words(tokens.long()).last_hidden_state
    guided = guidance_embedding(torch.full((len(tokens),), guidance - 1), GUIDANCE_WIDTH)
    grid = torch.arange(1, GRID + 1).flip(0) * (STEPS // GRID) - 1
    timesteps = [int(grid[int(number * GRID / steps)]) for number in range(steps)]
    latents = torch.randn(1, 4, 16, 16, generator=generator).expand(len(tokens), -1, -1, -1)
    for position, timestep in enumerate(timesteps):
        clean = consistent(model, noise, latents, torch.full((len(tokens),), timestep), states, guided)
        if position + 1 < steps:
            fresh = torch.randn(1, 4, 16, 16, generator=generator).expand_as(clean)
            latents = noise.add(clean, fresh, torch.full((len(tokens),), timesteps[position + 1]))
    return clean


def main() -> None:
    """Distil until `--minutes` are over; run again to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--guidance", type=float, nargs=2, default=(1.0, 5.0), help="range of guidance scales")
    parser.add_argument("--pictures", type=int, default=150, help="steps between sheets of samples")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    pool, trained = restore(arguments.work / "pool.pt"), restore(arguments.work / "unet.pt")
    assert pool is not None, "encode the pool first"
    assert trained is not None, "train the diffusion model first"
    latents, tokens, empty, scale = pool["latents"], pool["tokens"], pool["empty"], pool["scale"]
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    words, teacher, student, noise = text_encoder(len(tokenizer)), unet(), unet(GUIDANCE_WIDTH), Noise()
    words.load_state_dict(trained["words_ema"])
    teacher.load_state_dict(trained["model_ema"])
    words.requires_grad_(False).eval()
    teacher.requires_grad_(False).eval()
    student.load_state_dict(trained["model_ema"], strict=False)
    student.set_attn_processor(AttnProcessor())  # measured: plain attention trains faster here than the fused one
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    path, step, spent = arguments.work / "lcm.pt", 0, 0.0
    average = averaged(student)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0, fused=True
    )
    if state := restore(path):
        student.load_state_dict(state["student"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    start = time.monotonic() - spent
    grid = torch.arange(1, GRID + 1) * (STEPS // GRID) - 1
    nothing = words(empty.long()).last_hidden_state
    low, high = arguments.guidance

    def keep() -> None:
        save(
            path,
            student=student.state_dict(),
            average=average.state_dict(),
            optimizer=optimizer.state_dict(),
            step=step,
            spent=time.monotonic() - start,
        )
        _pictures(arguments.work, f"lcm-{step:05d}", tokenizer, average, words, scale)

    while (passed := (time.monotonic() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                arguments.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * passed)) / 2)
            )
        count = arguments.batch
        picked = torch.randint(len(latents), (count,))
        text = tokens[picked, torch.randint(tokens.shape[1], (count,))].long()
        position = torch.randint(GRID, (count,))
        now, then = grid[position], grid[(position - JUMP).clamp(min=0)]
        # Below the first grid point lies the clean picture itself: the boundary condition holds there.
        clean = latents[picked].float() * scale
        noisy = noise.add(clean, torch.randn_like(clean), now)
        guidance = low + (high - low) * torch.rand(count)
        guided = guidance_embedding(guidance - 1, GUIDANCE_WIDTH)
        with torch.no_grad():
            states = words(text).last_hidden_state
            with torch.autocast("cpu", torch.bfloat16):
                both = torch.cat([nothing.expand_as(states), states])
                without, along = teacher(torch.cat([noisy, noisy]), torch.cat([now, now]), both).sample.float().chunk(2)
            velocity = without + guidance.view(-1, 1, 1, 1) * (along - without)
            solved = noise.clean(velocity, noisy, now)
            earlier = noise.add(solved, noise.noise(velocity, noisy, now), then)
            wanted = consistent(average, noise, earlier, then, states, guided)
            wanted = torch.where((position < JUMP).view(-1, 1, 1, 1), solved, wanted)
        made = consistent(student, noise, noisy, now, states, guided)
        # Pseudo-Huber (Song and Dhariwal 2023): large early errors do not drown the rest.
        error = (made - wanted).square().mean(dim=(1, 2, 3))
        loss = ((error + 1e-4).sqrt() - 1e-2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        follow(average, student, min(0.95, step / (step + 10)))
        if step % 50 == 0:
            print(f"{step} {passed:.3f} loss {loss.item():.4f} {(time.monotonic() - start) / step:.2f} s", flush=True)
        if step % arguments.pictures == 0:
            keep()
    keep()


@torch.no_grad()
def _pictures(work: Path, name: str, tokenizer, model, words, scale: float) -> None:
    """Write a sheet of the training's prompts, four steps, the guidance that the card proposes."""
    decoder = autoencoder().eval()
    state = restore(work / "vae.pt")
    assert state is not None
    decoder.load_state_dict(state["full"])
    text = tokenizer(list(PROMPTS), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    sheet(decoder.decode(sample(model, words, text, guidance=3.0) / scale).sample, 8, work / f"{name}.png")


if __name__ == "__main__":
    main()
