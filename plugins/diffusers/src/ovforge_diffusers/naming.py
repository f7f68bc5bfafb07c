"""From CompVis', Stability's, OpenCLIP's and other makers' names of tensors to diffusers', by diffusers' own code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge_diffusers.header import Part
from ovforge_diffusers.requirements import need

if TYPE_CHECKING:
    import torch

__all__ = ["original_name", "to_diffusers", "wan_names"]

Tensors = dict[str, "torch.Tensor"]

_PREFIXES = {
    "UNet2DConditionModel": "model.diffusion_model.",
    "ControlNetModel": "control_model.",
    "AutoencoderKL": "first_stage_model.",
    "AutoencoderKLFlux2": "first_stage_model.",
    "AutoencoderKLQwenImage": "",
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
_STATISTICS = {f"bn.{name}": f"bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
_UNKNOWN = {
    "AutoencoderKLFlux2": _STATISTICS,
    "UNet2DConditionModel": {"time_embed.cond_proj.weight": "time_embedding.cond_proj.weight"},
    "ControlNetModel": _CONDITIONS,
}
"""Names that diffusers' code passes over: the guidance of consistency models, the added conditions of ControlNets, the
statistics of FLUX.2's latents."""

_INSIDE = re.compile(r"(?:encoder|decoder)\.((?:post_)?quant_conv\..+)")
"""Where FLUX.2's makers keep convolutions that diffusers has at the top."""


def original_name(part: Part, name: str, config: dict[str, Any]) -> str | None:
    """Return the name by which diffusers' code knows a tensor; None for one that is for training only, or not used."""
    if part.kind == "AutoencoderKL" and not name.startswith(_AUTOENCODER):
        return None
    if part.kind == "AutoencoderKLFlux2" and (inside := _INSIDE.fullmatch(name)):
        name = inside[1]
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
                "AutoencoderKLFlux2": code.convert_ldm_vae_checkpoint,
                "AutoencoderKLQwenImage": _of_wan,
            }[part.kind]
            found = convert(tensors, config)
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ModelError(f"its weights do not fit its config: {error!r}") from error
    found = {name: tensor for name, tensor in found.items() if tensor is not None} | unknown
    used = {id(tensor) for tensor in found.values()} | {tensor.data_ptr() for tensor in found.values()}
    strange = [name for name, tensor in tensors.items() if not {id(tensor), tensor.data_ptr()} & used]
    if strange and part.naming != "open_clip":
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ModelError(f"{strange[0]}{more} belong nowhere in a {part.kind} of its kind")
    return found


def _of_wan(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of Wan's autoencoder, which Qwen-Image's has the names of. The code is for its own form."""
    code = need("diffusers.loaders.single_file_utils", "converting a checkpoint")
    found: dict[str, Any] = code.convert_wan_vae_to_diffusers(dict(tensors))
    return found


def wan_names(names: Iterable[str]) -> dict[str, str]:
    """Return diffusers' name -> name, for the names of Wan's autoencoder."""
    return _of_wan({name: name for name in names}, {})
