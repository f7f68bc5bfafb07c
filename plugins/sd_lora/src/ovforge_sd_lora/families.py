"""Which models an adapter is for, by the names of its modules: those that are not a UNet of Stable Diffusion's kind.

Sources: huggingface/diffusers (models/transformers; loaders/lora_conversion_utils.py), comfyanonymous/ComfyUI
(model_detection.py), kohya-ss/sd-scripts (networks/lora_*.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ovforge_sd_lora.names import flat

__all__ = ["foreign_family"]

_FAMILIES: tuple[tuple[str, str], ...] = (
    (r".*motion_modules_\d", "AnimateDiff (motion modules)"),
    (r"double_stream_modulation|single_stream_modulation|single_transformer_blocks_\d+_attn_to_qkv_mlp", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"(double|single)_stream_blocks?_\d", "HiDream"),
    (r"double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|txt_in_individual_token_refiner|context_embedder_token_refiner",
     "HunyuanVideo"),
    (r"(double|single)_blocks_\d|single_transformer_blocks_\d", "FLUX.1"),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"joint_transformer_blocks_\d", "AuraFlow"),
    (r"joint_blocks_\d|transformer_blocks_\d+_(attn2?_(add_|to_add)|ff_context|norm1_context)", "Stable Diffusion 3"),
    (r"(noise|context)_refiner_\d|layers_\d+_(attention|feed_forward|adaLN_modulation)_", "Z-Image or Lumina"),
    (r"down_blocks_\d+_\d+_|up_blocks_\d+_\d+_(attention|channelwise|depthwise|kv_mapper|mapper)|clip_txt_mapper",
     "Stable Cascade"),
    (r"blocks_\d+_(self_attn|cross_attn)_(q_proj|k_proj|v_proj|output_proj)|blocks_\d+_adaln_modulation", "Cosmos"),
    (r"blocks_\d+_(self_attn|cross_attn|ffn|attn\d_to_)", "Wan"),
    (r"blocks_\d+_(attn1_Wqkv|attn2_q_proj|attn2_kv_proj|attn1_out_proj|mlp_fc)|pooler_", "Hunyuan-DiT"),
    (r"blocks_\d+_(attn_qkv|cross_attn_kv_linear|cross_attn_q_linear)|caption_projection|adaln_single",
     "PixArt or Sana"),
    (r"transformer_blocks_\d+_", "a diffusion transformer (as LTX-Video, CogVideoX or PixArt)"),
    (r"(layers|language_model_layers)_\d+_(self_attn|mlp)_(q|k|v|o|gate|up|down)_proj", "a language model"),
    (r"(encoder|decoder)_block_\d+_layer_\d", "T5"),
)  # fmt: skip
"""What a flat name begins with, without the levels around a model; the family. The first that fits counts."""

_AROUND = re.compile(r"^(?:(?:transformer(?!_blocks)|net|model|diffusion_model|base_model|lora_prior_unet|prior)_)+")
_KINDS = tuple((re.compile(pattern), family) for pattern, family in _FAMILIES)


def foreign_family(modules: Iterable[str]) -> str | None:
    """Return the family that modules' names are of; None if none of them tells another than Stable Diffusion's.

    The rule that stands first counts, since later ones are less sure.
    """
    names = [_AROUND.sub("", flat(module)) for module in modules]
    return next((family for kind, family in _KINDS if any(kind.match(name) for name in names)), None)
