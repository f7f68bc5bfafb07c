"""The embedding of a guidance scale, which distilled models take instead of a second, unconditional pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ovforge.errors import InputError

__all__ = ["guidance_scale_embedding"]


def guidance_scale_embedding(w: ArrayLike, dim: int = 512, dtype: DTypeLike = np.float32) -> NDArray[np.floating]:
    """Return embeddings (len(w), dim) of `w`, shape (batch,), which is the guidance scale minus one.

    Sines, then cosines, of 1000 * w at dim // 2 frequencies from 1 down to 1/10000; an odd `dim` ends in a zero.
    Source: `LatentConsistencyModelPipeline.get_guidance_scale_embedding` of diffusers. Angles reach 1000 * w, so
    the last bit of a frequency, where torch's float32 exp and ours may differ, is 1.2e-4 * w of the result.

    Raises InputError where `w` is not one-dimensional or `dim` is below 4 (there are no two frequencies).
    """
    scales = np.asarray(w, dtype=dtype)
    if scales.ndim != 1:
        raise InputError(f"w has shape {scales.shape}", where="guidance scale", hint="Give one for each sample.")
    if dim < 4:
        raise InputError(f"an embedding of {dim} numbers is too short", where="guidance scale", hint="Give 4 or more.")
    half = dim // 2
    spacing = np.log(np.float32(10000.0)) / np.float32(half - 1)
    # The exponents as torch has them; float64 then gives the rounding that its exp comes nearest to.
    exponents = np.arange(half, dtype=dtype) * -spacing
    frequencies = np.exp(exponents.astype(np.float64)).astype(dtype)
    angles = (scales * scales.dtype.type(1000))[:, None] * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), ((0, 0), (0, dim % 2)))
