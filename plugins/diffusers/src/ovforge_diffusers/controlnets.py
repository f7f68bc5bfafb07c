"""ControlNets of diffusion transformers: what they take and give, by their classes.

They take what the transformer takes, and `controlnet_cond`; they give what is added after its blocks, not scaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.denoisers import CLIP_TOKENS, SD3_TOKENS, flux_inputs, rotating_halves
from ovforge_diffusers.ports import SCALE, Sizes, Submodel
from ovforge_diffusers.qwenimage import qwenimage_controlnet
from ovforge_diffusers.zimage import zimage_controlnet

__all__ = ["CONTROLNETS", "controlnet_of"]

SAMPLE, SINGLE = "controlnet_block_samples_", "controlnet_single_block_samples_"
REFINED = "controlnet_refiner_samples_"
"""Outputs before their number: diffusers' names, and one for what is added after Z-Image's refiners."""


def controlnet_of(module: Any, latent: Sizes, factor: int) -> Submodel:
    """Describe a ControlNet. `latent` has the sizes of latents, of which one stands for `factor` pixels a side."""
    return CONTROLNETS[type(module).__name__](module, latent, factor)


def _sd3(module: Any, latent: Sizes, factor: int) -> Submodel:
    """Describe SD3ControlNetModel. Those of Stable Diffusion 3.5 large take tokens that the transformer has embedded.

    These do not read the text.
    """
    config = module.config
    rows = latent.batch and 2 * latent.batch
    channels, pooled, patch = config.in_channels, config.pooled_projection_dim, config.patch_size
    condition = channels + config.extra_conditioning_channels
    height, width = latent.height or 4 * patch, latent.width or 3 * patch
    tokens = CLIP_TOKENS + SD3_TOKENS if latent.batch and latent.height else None
    reads = config.joint_attention_dim is not None
    run = type(module).forward

    def forward(
        hidden_states: Any,
        timestep: Any,
        pooled_projections: Any,
        controlnet_cond: Any,
        encoder_hidden_states: Any = None,
    ) -> tuple[Any, ...]:
        with _leaving_text(module.transformer_blocks[-1]) if reads else contextlib.nullcontext():
            [samples] = run(
                module,
                hidden_states,
                controlnet_cond,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                return_dict=False,
            )
        return tuple(samples)

    sample = Port("hidden_states", (rows, channels, latent.height, latent.width), (2, channels, height, width))
    if not config.use_pos_embed:
        inner, packed = module.inner_dim, latent.height and latent.width and latent.height * latent.width // patch**2
        sample = Port("hidden_states", (rows, packed, inner), (2, height * width // patch**2, inner))
    inputs = [
        sample,
        Port("timestep", (rows,), (2,)),
        Port("pooled_projections", (rows, pooled), (2, pooled)),
        Port("controlnet_cond", (rows, condition, latent.height, latent.width), (2, condition, height, width)),
    ]
    if reads:
        states = config.joint_attention_dim
        inputs.append(Port("encoder_hidden_states", (rows, tokens, states), (2, 7, states)))
    return Submodel(forward, tuple(inputs), _samples(module))


def _flux(module: Any, latent: Sizes, factor: int) -> Submodel:
    """Describe FluxControlNetModel: of latents that are packed, or (XLabs') of pictures from -1 to 1.

    A union of several kinds takes which one it is, as controlnet_mode.
    """
    config, rows = module.config, latent.batch
    inputs = flux_inputs(config, latent)
    singles = tuple(f"{SINGLE}{number}" for number in range(len(module.controlnet_single_blocks)))
    run = type(module).forward

    def forward(
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        txt_ids: Any,
        img_ids: Any,
        controlnet_cond: Any,
        controlnet_mode: Any = None,
        guidance: Any = None,
    ) -> tuple[Any, ...]:
        last = contextlib.nullcontext() if singles else _leaving_text(module.transformer_blocks[-1])
        with rotating_halves("diffusers.models.transformers.transformer_flux"), last:
            of_doubles, of_singles = run(
                module,
                hidden_states,
                controlnet_cond,
                controlnet_mode,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                return_dict=False,
            )
        return (*(of_doubles or ()), *(of_singles or ()))

    condition = replace(inputs[0], name="controlnet_cond")
    if module.input_hint_block is not None:
        sides = [side and side * factor for side in (latent.height, latent.width)]
        # Three convolutions halve it, and what is left is packed by squares: 3 x 4 tokens of the example.
        example = (2, 3, *(8 * config.patch_size * tokens for tokens in (3, 4)))
        condition = Port("controlnet_cond", (rows, 3, *sides), example)
    inputs.append(condition)
    if module.union:
        inputs.append(Port("controlnet_mode", (rows, 1), (2, 1), "i64"))
    if config.guidance_embeds:
        inputs.append(Port("guidance", (rows,), (2,)))
    return Submodel(forward, tuple(inputs), (*_samples(module), *singles), SCALE)


def _qwenimage(module: Any, latent: Sizes, factor: int) -> Submodel:
    return qwenimage_controlnet(module, latent, _samples(module))


def _sana(module: Any, latent: Sizes, factor: int) -> Submodel:
    """Describe SanaControlNetModel. Raises ModelError for embedded places, which diffusers computes for one size."""
    config = module.config
    if config.interpolation_scale:
        raise ModelError(
            "it adds places to its tokens, which this loader does not convert",
            where="controlnet/config.json: interpolation_scale",
            hint="Take a ControlNet of a Sana for pictures of up to 2048 pixels.",
        )
    rows = latent.batch and 2 * latent.batch
    channels, states, patch = config.in_channels, config.caption_channels, config.patch_size
    run = type(module).forward

    def forward(
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any,
        controlnet_cond: Any,
    ) -> tuple[Any, ...]:
        [samples] = run(
            module,
            hidden_states,
            encoder_hidden_states,
            timestep,
            controlnet_cond,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )
        return tuple(samples)

    shape = (rows, channels, latent.height, latent.width)
    example = (2, channels, latent.height or 4 * patch, latent.width or 3 * patch)
    inputs = (
        Port("hidden_states", shape, example),
        Port("timestep", (rows,), (2,)),
        Port("encoder_hidden_states", (rows, None, states), (2, 7, states)),
        Port("encoder_attention_mask", (rows, None), (2, 7)),
        Port("controlnet_cond", shape, example),
    )
    return Submodel(forward, inputs, _samples(module))


@contextlib.contextmanager
def _leaving_text(block: Any) -> Iterator[None]:
    """Let a block compute nothing of the text after its attention: what nobody takes is not in the traced graph."""
    import torch

    own = block.attn.to_add_out, block.ff_context
    block.attn.to_add_out, block.ff_context = torch.nn.Identity(), torch.nn.Identity()
    try:
        yield
    finally:
        block.attn.to_add_out, block.ff_context = own


def _zimage(module: Any, latent: Sizes, factor: int) -> Submodel:
    return zimage_controlnet(module, latent, SAMPLE, REFINED)


def _samples(module: Any) -> tuple[str, ...]:
    return tuple(f"{SAMPLE}{number}" for number in range(len(module.controlnet_blocks)))


CONTROLNETS: dict[str, Callable[[Any, Sizes, int], Submodel]] = {
    "SD3ControlNetModel": _sd3,
    "FluxControlNetModel": _flux,
    "QwenImageControlNetModel": _qwenimage,
    "SanaControlNetModel": _sana,
    "ZImageControlNetModel": _zimage,
}
"""Class -> what describes it."""
