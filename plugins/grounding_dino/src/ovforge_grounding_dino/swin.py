"""Swin Transformer (Liu et al. 2021) for tracing, at any size: transformers' modules without what a trace would fix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["swin"]


def swin(backbone: Any, pixels: Tensor) -> list[Tensor]:
    """Swin Transformer (Liu et al. 2021) at any size. Returns the stages asked for, (pictures, channels, h, w)."""
    network, found = backbone.swin, []
    patches = network.embeddings.patch_embeddings
    across, down = patches.patch_size[1], patches.patch_size[0]
    pixels = functional.pad(pixels, (0, -pixels.shape[3] % across, 0, -pixels.shape[2] % down))
    hidden = network.embeddings.norm(patches.projection(pixels).permute(0, 2, 3, 1))
    for number, stage in enumerate(network.encoder.layers, start=1):
        for block in stage.blocks:
            hidden = _block(block, hidden)
        if (name := f"stage{number}") in backbone.out_features:
            found.append(backbone.hidden_states_norms[name](hidden).permute(0, 3, 1, 2))
        if stage.downsample is not None:
            padded = functional.pad(hidden, (0, 0, 0, -hidden.shape[2] % 2, 0, -hidden.shape[1] % 2))
            quarters = [padded[:, row::2, column::2] for column in range(2) for row in range(2)]
            hidden = stage.downsample.reduction(stage.downsample.norm(torch.cat(quarters, -1)))
    return found


def _block(block: Any, hidden: Tensor) -> Tensor:
    """Attention inside windows, every second time shifted by half a window. `hidden` is (pictures, h, w, channels)."""
    side, shift = block.window_size, block.shift_size
    height, width, channels = hidden.shape[1], hidden.shape[2], block.layernorm_before.normalized_shape[0]
    normal = functional.pad(block.layernorm_before(hidden), (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = normal.shape[1] // side, normal.shape[2] // side
    if shift:
        normal = torch.roll(normal, (-shift, -shift), (1, 2))
    windows = normal.reshape(-1, rows, side, columns, side, channels).transpose(2, 3)
    windows = windows.reshape(-1, rows * columns, side * side, channels)
    attention = block.attention
    heads, size = attention.num_attention_heads, attention.head_dim
    query, key, value = (
        project(windows).reshape(-1, rows * columns, side * side, heads, size).transpose(2, 3)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = (query * attention.scaling) @ key.transpose(3, 4) + attention.relative_position_bias()
    if shift:
        regions = _regions(rows * side, side, shift)[:, None] * 3 + _regions(columns * side, side, shift)[None]
        regions = regions.reshape(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, side * side)
        scores = scores + torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)[:, None]
    mixed = (scores.softmax(-1) @ value).transpose(2, 3).reshape(-1, rows, columns, side, side, channels)
    mixed = attention.o_proj(mixed).transpose(2, 3).reshape(-1, rows * side, columns * side, channels)
    if shift:
        mixed = torch.roll(mixed, (shift, shift), (1, 2))
    hidden = hidden + mixed[:, :height, :width]
    return hidden + block.mlp(block.layernorm_after(hidden))


def _regions(length: Any, side: int, shift: int) -> Tensor:
    """Number the three parts of an axis that a shift brings together: 0, 1, 2. Windows must not mix them."""
    index = torch.arange(length)
    return (index >= length - side).long() + (index >= length - shift).long()
