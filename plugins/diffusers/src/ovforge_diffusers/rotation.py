"""Rotary position embeddings (Su et al. 2021) of several axes, in reals, in the form that the runtime fuses.

diffusers turns neighbouring channels (2j, 2j + 1) together, some of it by products of complex numbers; the runtime
turns channels j and j + half. Here all even channels are put before all odd ones, in queries and keys alike, which
changes no product of the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["attending", "rotated", "rotation"]


def rotation(axes: Sequence[int], theta: float) -> Any:
    """Return a module of places [batch, tokens, axes] -> cosines and sines [batch, tokens, 1, channels].

    `axes` are the channels of each axis. Cosines and sines are there twice, for the even channels and the odd ones.
    """
    import torch

    class Rotation(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for number, channels in enumerate(axes):
                steps = torch.arange(0, channels, 2, dtype=torch.float64) / channels
                self.register_buffer(f"frequencies_{number}", (1.0 / theta**steps).float(), persistent=False)

        def forward(self, places: Any) -> tuple[Any, Any]:
            places = places.float()
            each = [places[..., n, None] * getattr(self, f"frequencies_{n}") for n in range(len(axes))]
            angles = torch.cat(each + each, dim=-1).unsqueeze(2)
            return angles.cos(), angles.sin()

    return Rotation()


def rotated(x: Any, cosines: Any, sines: Any) -> Any:
    """Rotate x [batch, tokens, heads, channels]; even channels come first in what is returned."""
    import torch

    half = x.shape[-1] // 2
    x = x.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(3)
    turned = torch.cat([x[..., half:] * -1.0, x[..., :half]], dim=-1)
    return x * cosines + turned * sines


@contextlib.contextmanager
def attending(attentions: Sequence[Any], processor: Any) -> Iterator[None]:
    """Let attentions of diffusers run by a processor that stands in for their own."""
    own = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.processor = processor
    try:
        yield
    finally:
        for attention, before in zip(attentions, own, strict=True):
            attention.processor = before
