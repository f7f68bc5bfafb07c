"""Train the latent diffusion model that is distilled afterwards: UNet and text encoder together.

v-prediction (Salimans and Ho 2022), min-SNR weighting (Hang et al. 2023), one caption in ten empty for classifier-free
guidance (Ho and Salimans 2021), moving average of the weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import torch
from data import sheet
from diffusers.models.attention_processor import AttnProcessor
from diffusion import STEPS, Noise, averaged, follow
from models import autoencoder, restore, save, text_encoder, unet
from transformers import CLIPTokenizer

PROMPTS = (
    "a beautiful pink unicorn, 8k",
    "a cute cat on a blue background",
    "a green dragon on a yellow background, 8k",
    "a red car",
    "an apple on a white background",
    "a purple rocket on a black background",
    "a blue fish on an orange background",
    "a penguin",
    "a pizza on a green background",
    "a yellow tree on a pink background",
    "a snowman on a red background",
    "a brown guitar",
    "a unicorn on a purple background",
    "a cactus, 8k",
    "an orange butterfly on a gray background",
    "a house on a blue background",
)


@torch.no_grad()
def sample(model, words, tokens, empty, noise: Noise, steps: int = 20, guidance: float = 3.0, seed: int = 0):
    """Return latents by DDIM (Song et al. 2021) with classifier-free guidance, unscaled."""
    states = words(torch.cat([empty.expand_as(tokens), tokens]).long()).last_hidden_state
    latents = torch.randn(len(tokens), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.linspace(STEPS - 1, 0, steps + 1).round().long()
    for now, then in itertools.pairwise(timesteps):
        both = torch.cat([latents, latents])
        without, along = model(both, now, states).sample.chunk(2)
        velocity = without + guidance * (along - without)
        batch = now.expand(len(tokens))
        clean, noisy = noise.clean(velocity, latents, batch), noise.noise(velocity, latents, batch)
        latents = noise.add(clean, noisy, then.expand(len(tokens)))
    return clean


def main() -> None:
    """Train until `--minutes` are over; run again with `--resume` to go on from the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=500, help="steps between sheets of samples")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pool = restore(arguments.work / "pool.pt")
    assert pool is not None, "encode the pool first"
    latents, tokens, empty, scale = pool["latents"], pool["tokens"], pool["empty"], pool["scale"]
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    decoder = autoencoder().eval()
    words, model, noise = text_encoder(len(tokenizer)), unet(), Noise()
    model.set_attn_processor(AttnProcessor())  # measured: plain attention trains faster here than the fused one
    path = arguments.work / "unet.pt"
    parameters = [*model.parameters(), *words.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    words_average, model_average = averaged(words), averaged(model)
    step, spent = 0, 0.0
    if state := restore(path):
        for part, key in (
            (words, "words"),
            (model, "model"),
            (words_average, "words_ema"),
            (model_average, "model_ema"),
        ):
            part.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    start = time.monotonic() - spent
    while (passed := (time.monotonic() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                arguments.rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * passed)) / 2)
            )
        picked = torch.randint(len(latents), (arguments.batch,))
        clean = latents[picked].float() * scale
        text = tokens[picked, torch.randint(tokens.shape[1], (arguments.batch,))].long()
        text[torch.rand(arguments.batch) < 0.1] = empty.long()
        timestep = torch.randint(STEPS, (arguments.batch,))
        added = torch.randn_like(clean)
        noisy = noise.add(clean, added, timestep)
        alpha, sigma = noise.at(timestep)
        states = words(text).last_hidden_state  # measured: float32 attention is faster here than bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(noisy, timestep, states).sample.float()
        snr = (alpha / sigma).square()
        weight = snr.clamp(max=5) / (snr + 1)
        error = (velocity - (alpha * added - sigma * clean)).square()
        loss = (weight * error).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.999, step / (step + 10))
        follow(words_average, words, decay)
        follow(model_average, model, decay)
        if step % 50 == 0:
            spent = time.monotonic() - start
            print(f"{step} {passed:.3f} loss {error.mean().item():.4f} {spent / step:.2f} s", flush=True)
        if step % arguments.pictures == 0 or step == 200:
            save(
                path,
                words=words.state_dict(),
                model=model.state_dict(),
                words_ema=words_average.state_dict(),
                model_ema=model_average.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                spent=time.monotonic() - start,
            )
            _pictures(
                arguments.work, f"unet-{step:05d}", decoder, tokenizer, model_average, words_average, empty, scale
            )
    save(
        path,
        words=words.state_dict(),
        model=model.state_dict(),
        words_ema=words_average.state_dict(),
        model_ema=model_average.state_dict(),
        optimizer=optimizer.state_dict(),
        step=step,
        spent=time.monotonic() - start,
    )
    _pictures(arguments.work, "unet-last", decoder, tokenizer, model_average, words_average, empty, scale)


@torch.no_grad()
def _pictures(work: Path, name: str, decoder, tokenizer, model, words, empty, scale: float) -> None:
    """Write a sheet of the prompts above."""
    state = restore(work / "vae.pt")
    assert state is not None
    decoder.load_state_dict(state["full"])
    text = tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.autocast("cpu", torch.bfloat16):
        latents = sample(model, words, text, empty, Noise())
    sheet(decoder.decode(latents.float() / scale).sample, 8, work / f"{name}.png")


if __name__ == "__main__":
    main()
