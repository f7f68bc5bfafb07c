"""The networks, all standard classes, and how checkpoints of their training are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

TEXT_WIDTH = 128
GUIDANCE_WIDTH = 128
"""Width of the guidance embedding that the consistency model takes (`time_cond_proj_dim`)."""

CHANNELS = (16, 32, 64, 96)


def _autoencoder(channels: tuple[int, ...], size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
    )


def autoencoder() -> AutoencoderKL:
    """Return the autoencoder that ships: 128x128 pictures, 16x16x4 latents."""
    return _autoencoder(CHANNELS, 128)


def small_autoencoder() -> AutoencoderKL:
    """Return one for pictures of half the size and the same latents: its encoder learns much faster."""
    return _autoencoder(CHANNELS[1:], 64)


def text_encoder(vocabulary: int) -> CLIPTextModel:
    """Return the text encoder; the two last words of the vocabulary are CLIP's start and end."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def unet(guidance_width: int | None = None) -> UNet2DConditionModel:
    """Return the denoiser: 16x16x4 latents, attention at 8x8 and 4x4 only (at 16x16 it costs more than it brings)."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 112, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
        time_cond_proj_dim=guidance_width,
    )


def save(path: Path, **state: Any) -> None:
    """Write a checkpoint under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def restore(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint that `save` wrote; None if there is none."""
    return torch.load(path, weights_only=True) if path.is_file() else None
