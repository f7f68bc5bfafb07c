"""Which models an adapter is for, by the names of its modules: those that are not a UNet of Stable Diffusion's kind.

Sources: huggingface/diffusers (models/transformers; loaders/lora_conversion_utils.py), comfyanonymous/ComfyUI
(model_detection.py), kohya-ss/sd-scripts (networks/lora_*.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ovforge_sd_lora.names import flat

__all__ = ["Family", "foreign_family"]


@dataclass(frozen=True, slots=True)
class Family:
    """What modules' names tell: `name` for people, and the families of `architectures` that have such modules."""

    name: str
    fits: tuple[str, ...] = ()


_SD3, _FLUX1, _FLUX2, _QWEN, _SANA = "Stable Diffusion 3", "FLUX.1", "FLUX.2", "Qwen-Image", "Sana"
_LTX = "LTX-Video"

_FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r".*motion_modules_\d", "AnimateDiff (motion modules)", ()),
    (r"(double|single)_stream_modulation|single_transformer_blocks_\d+_attn_to_(qkv_mlp|out)"
     r"|transformer_blocks_\d+_ff(_context)?_linear_(in|out)", _FLUX2, (_FLUX2,)),
    (r"distilled_guidance_layer", "Chroma", ()),
    (r"(double|single)_stream_blocks?_\d", "HiDream", ()),
    (r"double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|txt_in_individual_token_refiner|context_embedder_token_refiner",
     "HunyuanVideo", ()),
    (r"double_blocks_\d+_(img|txt)_mod_lin|single_blocks_\d+_modulation|double_blocks_\d+_(qkv|proj)_lora"
     r"|single_transformer_blocks_\d", _FLUX1, (_FLUX1,)),
    (r"(double|single)_blocks_\d", "FLUX.1 or FLUX.2", (_FLUX1, _FLUX2)),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)", _QWEN, (_QWEN,)),
    (r"joint_transformer_blocks_\d", "AuraFlow", ()),
    (r"joint_blocks_\d|transformer_blocks_\d+_attn2_(add_|to_add)", _SD3, (_SD3,)),
    (r"transformer_blocks_\d+_(ff_context|norm1_context)", "Stable Diffusion 3 or FLUX.1", (_SD3, _FLUX1)),
    (r"transformer_blocks_\d+_attn_(add_|to_add)", "Stable Diffusion 3, FLUX or Qwen-Image",
     (_SD3, _FLUX1, _FLUX2, _QWEN)),
    (r"(noise|context)_refiner_\d|layers_\d+_(attention|attn|feed_forward|adaLN_modulation)_", "Z-Image or Lumina",
     ("Z-Image", "Lumina 2")),
    (r"down_blocks_\d+_\d+_|up_blocks_\d+_\d+_(attention|channelwise|depthwise|kv_mapper|mapper)|clip_txt_mapper",
     "Stable Cascade", ()),
    (r"blocks_\d+_(self_attn|cross_attn)_(q_proj|k_proj|v_proj|output_proj)|blocks_\d+_adaln_modulation", "Cosmos", ()),
    (r"blocks_\d+_((self_attn|cross_attn)_([qkvo]|norm_[qk]|[kv]_img)$|ffn|attn\d_to_)", "Wan", ()),
    (r"blocks_\d+_(attn1_Wqkv|attn2_q_proj|attn2_kv_proj|attn1_out_proj|mlp_fc)|pooler_", "Hunyuan-DiT", ()),
    (r"transformer_blocks_\d+_ff_conv_|blocks_\d+_mlp_(inverted|depth|point)_conv", _SANA, (_SANA,)),
    (r"blocks_\d+_(attn_qkv|cross_attn_kv_linear|cross_attn_q_linear)|caption_projection|adaln_single",
     "PixArt or Sana", (_SANA, _LTX)),
    (r"transformer_blocks_\d+_attn_to_", "a diffusion transformer (as Stable Diffusion 3, FLUX or Qwen-Image)",
     (_SD3, _FLUX1, _FLUX2, _QWEN)),
    (r"transformer_blocks_\d+_attn[12]_", "a diffusion transformer (as LTX-Video, CogVideoX or PixArt)",
     (_SANA, _SD3, _LTX)),
    (r"transformer_blocks_\d+_ff_", "a diffusion transformer", (_SD3, _FLUX1, _LTX)),
    (r"transformer_blocks_\d+_", "a diffusion transformer", ()),
    (r"(layers|language_model_layers)_\d+_(self_attn|mlp)_(q|k|v|o|gate|up|down)_proj", "a language model", ()),
    (r"(encoder|decoder)_block_\d+_layer_\d", "T5", ()),
    (r"(time_text_embed|context_embedder|x_embedder|proj_out$|norm_out_linear|img_in|txt_in|final_layer)",
     "a diffusion transformer", (_SD3, _FLUX1, _FLUX2, _QWEN, _SANA, _LTX, "Z-Image", "Lumina 2")),
)  # fmt: skip
"""What a flat name begins with, without the levels around a model; the family. The first that fits counts."""

_AROUND = re.compile(r"^(?:(?:transformer(?!_blocks)|net|model|diffusion_model|base_model|lora_prior_unet|prior)_)+")
_KINDS = tuple((re.compile(pattern), Family(name, fits)) for pattern, name, fits in _FAMILIES)


def foreign_family(modules: Iterable[str]) -> Family | None:
    """Return the family that modules' names are of; None if none of them tells another than Stable Diffusion's.

    The rule that stands first counts, since later ones are less sure.
    """
    names = [_AROUND.sub("", flat(module)) for module in modules]
    return next((family for kind, family in _KINDS if any(kind.match(name) for name in names)), None)
