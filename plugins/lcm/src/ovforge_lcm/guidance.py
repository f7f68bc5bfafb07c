"""Guidance of latent consistency models: distilled into the UNet, which takes its scale as an embedding.

Sources: Luo et al., "Latent Consistency Models" (2023), section 4.2; Meng et al., "On Distillation of Guided Diffusion
Models" (2023), section 3.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Embedder, Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle

__all__ = ["DEFAULTS", "GuidanceEmbedding", "embedders", "guidance_embedding"]

DEFAULTS = {"steps": 4, "guidance_scale": 8.5}
"""Those of the published models, for a model that brings none of its own."""

DEFAULTS_FILE = "ovforge.json"
INPUT = "timestep_cond"


def guidance_embedding(value: float, *, width: int) -> NDArray[np.float32]:
    """Return the embedding of a guidance scale, float32 (width,).

    Source: `get_guidance_scale_embedding` of diffusers' LatentConsistencyModelPipeline; sines, then cosines, of
    1000 * (scale - 1) at frequencies from 1 to 1/10000. It is computed on the host in float32, whatever the device
    computes in: at angles of some thousands, half of float32's digits would leave no sine.
    """
    half = width // 2
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    angle = np.float32((value - 1) * 1000.0) * frequency
    embedding = np.concatenate([np.sin(angle), np.cos(angle)])
    return np.pad(embedding, (0, width % 2))


def embedders(options: None, bundle: ModelBundle) -> Mapping[str, Embedder]:
    """Return what computes the UNet's input `timestep_cond` of a guidance scale; {} if it has none."""
    width = _width(bundle)
    return {INPUT: partial(guidance_embedding, width=width)} if width else {}


class GuidanceEmbedding:
    """Says of models whose UNet takes an embedded guidance scale how they are called: their defaults.

    The models stay as they are; the embedding is what `embedders` computes.
    """

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Write the defaults that the model does not bring itself. Raises ModelError for a file that is not valid."""
        width = _width(bundle)
        if not width:
            return Report(notes=["nothing to do: the UNet takes no embedding of a guidance scale"])
        own = _own(bundle)
        defaults = {**DEFAULTS, **own.get("defaults", {})}
        bundle.assets[DEFAULTS_FILE] = json.dumps({**own, "defaults": defaults}, sort_keys=True).encode()
        listing = ", ".join(f"{name} = {value}" for name, value in defaults.items())
        return Report(applied=[f"unet: guidance as an embedding of {width} numbers; by default {listing}"])


def _width(bundle: ModelBundle) -> int | None:
    """Return the width of the UNet's embedding of a guidance scale; None if it takes none."""
    width: int | None = bundle.configs.get("unet", {}).get("time_cond_proj_dim")
    if width is not None and (not isinstance(width, int) or width < 4):
        raise ModelError(
            f"time_cond_proj_dim = {width!r} is not the width of an embedding",
            where="unet/config.json",
            hint="Published models have 256.",
        )
    return width


def _own(bundle: ModelBundle) -> dict[str, Any]:
    """Return what the model itself says in ovforge.json."""
    data = bundle.assets.get(DEFAULTS_FILE)
    try:
        own = json.loads(data) if data else {}
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where=DEFAULTS_FILE) from error
    if not isinstance(own, dict) or not isinstance(own.get("defaults", {}), dict):
        raise ModelError('expected {"defaults": {...}}', where=DEFAULTS_FILE)
    return own
