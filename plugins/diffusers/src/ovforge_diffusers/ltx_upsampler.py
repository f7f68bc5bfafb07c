"""LTX-Video's latent upsampler (HaCohen et al. 2024), LTXLatentUpsamplerModel: latents of a video of twice the sides.

The makers' files have diffusers' names.
"""

from __future__ import annotations

import re
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.header import Shapes
from ovforge_diffusers.ports import Submodel

__all__ = ["CLASS", "HOME", "ltx_upsampler", "ltx_upsampler_config"]

CLASS = "LTXLatentUpsamplerModel"
HOME = "diffusers.pipelines.ltx.modeling_latent_upsampler"
_KINDS = {(4, 4): (True, False), (2, 5): (False, True), (8, 5): (True, True)}
"""Values that become one, and axes of the layer's weights -> whether sides double, and frames."""


def ltx_upsampler(module: Any) -> Submodel:
    """Describe the upsampler: latents [batch, channels, frames, height, width] of the autoencoder's own scale."""

    run = type(module).forward

    def forward(latent_sample: Any) -> tuple[Any, ...]:
        return (run(module, latent_sample),)

    channels = module.config.in_channels
    shape = (None, channels, None, None, None)
    return Submodel(forward, (Port("latent_sample", shape, (2, channels, 3, 2, 4)),), ("sample",))


def ltx_upsampler_config(own: Shapes) -> dict[str, Any]:
    """Return the config of tensors. Raises ModelError for a layer that enlarges in another way."""
    middle, channels, *kernel = own["initial_conv.weight"]
    layer = own["upsampler.0.weight"]
    if layer[0] % middle or (kind := (layer[0] // middle, len(layer))) not in _KINDS:
        raise ModelError("its layer that enlarges is not one of LTX-Video's", where="upsampler.0.weight")
    spatial, temporal = _KINDS[kind]
    return {
        "_class_name": CLASS,
        "in_channels": channels,
        "mid_channels": middle,
        "num_blocks_per_stage": len(
            {name for name in own if re.fullmatch(r"res_blocks\.\d{1,3}\.conv1\.weight", name)}
        ),
        "dims": len(kernel),
        "spatial_upsample": spatial,
        "temporal_upsample": temporal,
    }
