"""Sizes that families were trained on, one for each ratio of the sides: `use_resolution_binning` of diffusers.

Source: the lists of PixArt (Chen et al. 2023) in diffusers' pipelines for PixArt-Sigma and Sana, as multiples of a
sixteenth of the side of a square.
"""

from __future__ import annotations

__all__ = ["binned"]

_TALL = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21), (12, 20),
    (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15), (17, 14), (18, 14),
    (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (27, 9), (32, 8),
)  # fmt: skip
"""Heights and widths, for pictures of up to about a megapixel."""

_LARGE = (
    (8, 32), (8, 31), (8, 30), *_TALL[1:31], (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip
"""Likewise, for larger ones."""


def binned(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the (width, height) of the size whose sides are most alike those given, around a square of `side`."""
    ratio = height / width
    sizes = _LARGE if side >= 2048 else _TALL
    # diffusers compares ratios of two decimals, as they stand in its lists.
    high, wide = min(sizes, key=lambda size: abs(round(size[0] / size[1], 2) - ratio))
    return wide * side // 16, high * side // 16
