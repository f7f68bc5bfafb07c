"""Diffusion transformers: what they take and give, by their classes.

Rotary position embeddings are computed inside, in the form that the runtime fuses.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.ltx import ltx
from ovforge_diffusers.lumina2 import lumina2
from ovforge_diffusers.pixart import pixart
from ovforge_diffusers.ports import SCALE, Sizes, Submodel
from ovforge_diffusers.qwenimage import qwenimage
from ovforge_diffusers.rotation import rotated
from ovforge_diffusers.sana import sana
from ovforge_diffusers.zimage import zimage

__all__ = ["TRANSFORMERS", "transformer"]

CLIP_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 256, 512
"""Tokens of a prompt that diffusers' pipelines read by default."""


def transformer(module: Any, latent: Sizes) -> Submodel:
    """Describe a diffusion transformer. `latent` has the sizes of the autoencoder's latents."""
    return TRANSFORMERS[type(module).__name__](module, latent)


def _sd3(module: Any, latent: Sizes) -> Submodel:
    """Describe SD3Transformer2DModel of Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""
    config = module.config
    rows = latent.batch and 2 * latent.batch
    channels, width, pooled = config.in_channels, config.joint_attention_dim, config.pooled_projection_dim
    patch = config.patch_size
    tokens = CLIP_TOKENS + SD3_TOKENS if latent.batch and latent.height else None
    run = type(module).forward

    def forward(
        hidden_states: Any, timestep: Any, encoder_hidden_states: Any, pooled_projections: Any
    ) -> tuple[Any, ...]:
        result: tuple[Any, ...] = run(
            module, hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False
        )
        return result

    example = (2, channels, latent.height or 4 * patch, latent.width or 3 * patch)
    return Submodel(
        forward,
        (
            Port("hidden_states", (rows, channels, latent.height, latent.width), example),
            Port("timestep", (rows,), (2,)),
            Port("encoder_hidden_states", (rows, tokens, width), (2, 7, width)),
            Port("pooled_projections", (rows, pooled), (2, pooled)),
        ),
        ("out_sample",),
    )


def _flux(module: Any, latent: Sizes) -> Submodel:
    """Describe FluxTransformer2DModel: latents of 2 x 2 pixels packed to rows, their places as ids (row, column).

    Rows are those of a batch: guidance is an input, or true guidance calls twice.
    """
    inputs = flux_inputs(module.config, latent)
    run = type(module).forward

    def forward(
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        txt_ids: Any,
        img_ids: Any,
        guidance: Any = None,
    ) -> tuple[Any, ...]:
        with rotating_halves("diffusers.models.transformers.transformer_flux"):
            result: tuple[Any, ...] = run(
                module,
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                img_ids,
                txt_ids,
                guidance,
                return_dict=False,
            )
        return result

    if module.config.guidance_embeds:
        inputs.append(Port("guidance", (latent.batch,), (2,)))
    return Submodel(forward, tuple(inputs), ("out_sample",), SCALE)


def flux_inputs(config: Any, latent: Sizes) -> list[Port]:
    """Return what FLUX.1's transformer and its ControlNets take alike; latents are packed to rows."""
    rows, width, pooled = latent.batch, config.joint_attention_dim, config.pooled_projection_dim
    channels, axes = config.in_channels, len(config.axes_dims_rope)
    packed = latent.height and latent.width and (latent.height // 2) * (latent.width // 2)
    tokens = FLUX_TOKENS if rows and packed else None
    return [
        Port("hidden_states", (rows, packed, channels), (2, 12, channels)),
        Port("timestep", (rows,), (2,)),
        Port("encoder_hidden_states", (rows, tokens, width), (2, 7, width)),
        Port("pooled_projections", (rows, pooled), (2, pooled)),
        Port("txt_ids", (tokens, axes), (7, axes)),
        Port("img_ids", (packed, axes), (12, axes)),
    ]


def _flux2(module: Any, latent: Sizes) -> Submodel:
    """Describe Flux2Transformer2DModel: folded latents as rows, and the places of all tokens for each row of the batch.

    Places are (picture, row, column, word). Rows are those of a batch: there is guidance as an input, or none, or
    diffusers calls twice.
    """
    config = module.config
    rows, width, channels = latent.batch, config.joint_attention_dim, config.in_channels
    axes = len(config.axes_dims_rope)
    packed = latent.height and latent.width and (latent.height // 2) * (latent.width // 2)
    tokens = FLUX_TOKENS if rows and packed else None
    run = type(module).forward

    def forward(
        hidden_states: Any, timestep: Any, encoder_hidden_states: Any, txt_ids: Any, img_ids: Any, guidance: Any = None
    ) -> tuple[Any, ...]:
        with rotating_halves("diffusers.models.transformers.transformer_flux2"):
            result: tuple[Any, ...] = run(
                module,
                hidden_states,
                encoder_hidden_states,
                timestep,
                img_ids,
                txt_ids,
                guidance,
                return_dict=False,
            )
        return result

    inputs = [
        Port("hidden_states", (rows, packed, channels), (2, 12, channels)),
        Port("timestep", (rows,), (2,)),
        Port("encoder_hidden_states", (rows, tokens, width), (2, 7, width)),
        Port("txt_ids", (rows, tokens, axes), (2, 7, axes)),
        Port("img_ids", (rows, packed, axes), (2, 12, axes)),
    ]
    if config.guidance_embeds:
        inputs.append(Port("guidance", (rows,), (2,)))
    return Submodel(forward, tuple(inputs), ("out_sample",), SCALE)


TRANSFORMERS: dict[str, Callable[[Any, Sizes], Submodel]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": zimage,
    "SanaTransformer2DModel": sana,
    "PixArtTransformer2DModel": pixart,
    "Lumina2Transformer2DModel": lumina2,
    "QwenImageTransformer2DModel": qwenimage,
    "LTXVideoTransformer3DModel": ltx,
}
"""Class -> what describes it."""


@contextlib.contextmanager
def rotating_halves(module: str) -> Iterator[None]:
    """Let a module of diffusers rotate queries and keys in the form that the runtime has an operation for."""
    code: Any = importlib.import_module(module)
    own = code.apply_rotary_emb
    code.apply_rotary_emb = _rotate
    try:
        yield
    finally:
        code.apply_rotary_emb = own


def _rotate(x: Any, angles: tuple[Any, Any], sequence_dim: int = 1) -> Any:
    """Rotate x [batch, tokens, heads, channels] by cosines and sines [tokens, channels]; even channels come first."""
    import torch

    if sequence_dim != 1:
        raise ValueError(f"rotation of the axis {sequence_dim}")
    cosines, sines = (torch.cat([a[:, 0::2], a[:, 1::2]], dim=-1)[None, :, None, :] for a in angles)
    return rotated(x, cosines, sines)
