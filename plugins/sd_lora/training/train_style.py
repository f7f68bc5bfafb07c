"""Train a pencil-drawing LoRA on the embedded text-to-image model, from the model's own pictures.

The model draws; a filter of PIL turns what it drew into a pencil drawing; the LoRA learns to draw that at once, from
the same words and noise, at each of the steps of latent consistency sampling. The loss is of pixels, behind the
decoder: the small autoencoder's encoder knows no drawings.

    pip install peft
    python train_style.py --model ../../lcm/tests/data/embedded-diffusers --words ../../lcm/training/objects.txt \
        --output ../src/ovforge_sd_lora/examples/pencil.safetensors --minutes 25
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from safetensors.torch import save_file

STEPS = 4
GUIDANCE = 8.0
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray")
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_out)"


def pencil(picture: Image.Image) -> Image.Image:
    """Return a pencil drawing: a grey picture divided by its blurred negative (colour dodge), darkened."""
    grey = ImageOps.grayscale(picture)
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(5))
    light = np.minimum(255.0, np.asarray(grey, float) * 255 / np.maximum(255 - np.asarray(blurred, float), 1))
    drawn = Image.fromarray((255 * (light / 255) ** 2.5).astype(np.uint8))
    return ImageChops.multiply(drawn, drawn).filter(ImageFilter.GaussianBlur(0.8)).convert("RGB")


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Return (3, height, width) from -1 to 1 as a picture."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def to_pixels(picture: Image.Image) -> torch.Tensor:
    """Return a picture as (3, height, width) from -1 to 1."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


class Model:
    """The parts of the pipeline, and one step of its sampling."""

    def __init__(self, folder: Path) -> None:
        self.pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            folder, safety_checker=None, torch_dtype=torch.float32
        )
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        for part in (self.unet, self.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(STEPS)
        self.times = scheduler.timesteps.clone()
        self.guidance = self.pipe.get_guidance_scale_embedding(
            torch.tensor([GUIDANCE - 1]), self.unet.config.time_cond_proj_dim
        )

    def words(self, prompts: list[str]) -> torch.Tensor:
        """Return the text encoder's states, (prompts, tokens, width)."""
        with torch.no_grad():
            states: torch.Tensor = self.pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        return states

    def denoised(self, latents: torch.Tensor, index: int, words: torch.Tensor) -> torch.Tensor:
        """Return what the consistency function says at step `index`: clean latents."""
        scheduler, time_ = self.pipe.scheduler, self.times[index]
        condition = self.guidance.repeat(len(latents), 1)
        velocity = self.unet(latents, time_, words, timestep_cond=condition, return_dict=False)[0]
        alpha = scheduler.alphas_cumprod[time_]
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(time_)
        clean: torch.Tensor = out * (alpha.sqrt() * latents - (1 - alpha).sqrt() * velocity) + skip * latents
        return clean

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Return clean latents at the noise of step `index`."""
        alpha = self.pipe.scheduler.alphas_cumprod[self.times[index]]
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents."""
        decoded: torch.Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return decoded


def caption(objects: list[str], rng: random.Random) -> str:
    """Return a caption as the model has learnt them."""
    colour, ground = rng.choice(("", *COLOURS)), rng.choice(("white", "black", *COLOURS[:7], "gray"))
    thing = f"{colour} {rng.choice(objects)}".strip()
    article = "an" if thing[0] in "aeiou" else "a"
    return f"{article} {thing} on a {ground} background" + rng.choice(("", ", 8k"))


def train(model: Model, objects: list[str], arguments: argparse.Namespace) -> None:
    """Train until the time is over."""
    rng = random.Random(1)
    parameters = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.0)
    start, step, smooth = time.time(), 0, None
    while (left := arguments.minutes * 60 - (time.time() - start)) > 0:
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, left / (arguments.minutes * 20))  # falls in the last third
        words = model.words([caption(objects, rng) for _ in range(arguments.batch)])
        noise = [torch.randn(arguments.batch, 4, 16, 16) for _ in range(STEPS)]
        plain, drawn = noise[0], noise[0]
        total = 0.0
        optimizer.zero_grad()
        for index in range(STEPS):
            with torch.no_grad():
                model.unet.disable_adapters()
                plain_clean = model.denoised(plain, index, words)
                target = torch.stack([to_pixels(pencil(to_picture(p))) for p in model.pixels(plain_clean)])
                model.unet.enable_adapters()
            drawn_clean = model.denoised(drawn, index, words)
            loss = torch.nn.functional.mse_loss(model.pixels(drawn_clean), target)
            loss.backward()
            total += loss.item() / STEPS
            if index + 1 < STEPS:
                plain = model.noised(plain_clean, noise[index + 1], index + 1)
                drawn = model.noised(drawn_clean.detach(), noise[index + 1], index + 1)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        smooth = total if smooth is None else 0.95 * smooth + 0.05 * total
        if step % 10 == 0:
            print(f"{step} steps, {time.time() - start:.0f} s, loss {smooth:.4f}", flush=True)
        if step % 50 == 0:
            save(model, arguments, step)
    save(model, arguments, step)


def save(model: Model, arguments: argparse.Namespace, steps: int) -> None:
    """Write the adapter in kohya's naming, float16, with what it is in its metadata."""
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(model.unet).items():
        module, _, half = key.removesuffix(".weight").rpartition(".lora_")
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.lora_{'down' if half == 'A' else 'up'}.weight"] = value.half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(arguments.rank))
    metadata = {
        "modelspec.title": "Pencil",
        "modelspec.description": "Pencil drawings, for the text-to-image model that ovforge-lcm ships",
        "modelspec.license": "MIT (see NOTICE)",
        "modelspec.architecture": "ovforge-embedded/lora",
        "ss_training_comment": f"train_style.py, {steps} steps of {arguments.batch}",
        "ss_network_dim": str(arguments.rank),
        "ss_tag_frequency": json.dumps({}),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.output, metadata)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True, help="objects.txt of the model's training")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model = Model(arguments.model)
    lines = [line.partition("=")[0].strip() for line in arguments.words.read_text().splitlines()]
    objects = [line for line in lines if line and not line.startswith("#")]
    model.unet.add_adapter(peft.LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=TARGETS))
    count = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
    print(f"{count} numbers to train, {len(objects)} objects")
    train(model, objects, arguments)


if __name__ == "__main__":
    main()
