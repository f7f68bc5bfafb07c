"""From CompVis', Stability's and OpenCLIP's names of tensors to diffusers', by diffusers' own conversion code."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge_diffusers.header import Part
from ovforge_diffusers.requirements import need

if TYPE_CHECKING:
    import torch

__all__ = ["original_name", "to_diffusers"]

Tensors = dict[str, "torch.Tensor"]

_PREFIXES = {
    "UNet2DConditionModel": "model.diffusion_model.",
    "ControlNetModel": "control_model.",
    "AutoencoderKL": "first_stage_model.",
    "CLIPTextModel": "cond_stage_model.model.",
    "CLIPTextModelWithProjection": "conditioner.embedders.1.model.",
}
"""Under which prefixes diffusers' code looks, wherever the tensors lie."""

_AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_CONDITIONS = {
    f"label_emb.0.{old}.{kind}": f"add_embedding.linear_{new}.{kind}"
    for old, new in ((0, 1), (2, 2))
    for kind in ("weight", "bias")
}
_UNKNOWN = {
    "UNet2DConditionModel": {"time_embed.cond_proj.weight": "time_embedding.cond_proj.weight"},
    "ControlNetModel": _CONDITIONS,
}
"""Names that diffusers' code passes over: the guidance of consistency models, the added conditions of ControlNets."""


def original_name(part: Part, name: str, config: dict[str, Any]) -> str | None:
    """Return the name by which diffusers' code knows a tensor; None for one that is for training only, or not used."""
    if part.kind == "AutoencoderKL" and not name.startswith(_AUTOENCODER):
        return None
    if part.naming == "open_clip":
        layer = re.match(r"transformer\.resblocks\.(\d{1,5})\.", name)
        if layer and int(layer[1]) >= config["num_hidden_layers"]:
            return None  # Stable Diffusion 2 uses the last but one layer
        if name == "text_projection" and part.kind == "CLIPTextModel":
            return None
    return _PREFIXES[part.kind] + name


def to_diffusers(part: Part, tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Return a submodel's weights in diffusers' naming. `given` has the names of `original_name`.

    Raises ModelError for tensors that have no place there: a part of a model is never left out in silence.
    """
    code = need("diffusers.loaders.single_file_utils", "converting a checkpoint")
    prefix = _PREFIXES[part.kind]
    unknown = {
        new: tensors[prefix + old] for old, new in _UNKNOWN.get(part.kind, {}).items() if prefix + old in tensors
    }
    try:
        if part.naming == "open_clip":
            stand_in = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            found = code.convert_open_clip_checkpoint(stand_in, tensors, prefix=prefix)
        else:
            convert = {
                "UNet2DConditionModel": code.convert_ldm_unet_checkpoint,
                "ControlNetModel": code.convert_controlnet_checkpoint,
                "AutoencoderKL": code.convert_ldm_vae_checkpoint,
            }[part.kind]
            found = convert(tensors, config)
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ModelError(f"its weights do not fit its config: {error!r}") from error
    found = {name: tensor for name, tensor in found.items() if tensor is not None} | unknown
    used = {tensor.data_ptr() for tensor in found.values()}
    strange = [name for name, tensor in tensors.items() if tensor.data_ptr() not in used]
    if strange and part.naming != "open_clip":
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ModelError(f"{strange[0]}{more} belong nowhere in a {part.kind} of its kind")
    return found
