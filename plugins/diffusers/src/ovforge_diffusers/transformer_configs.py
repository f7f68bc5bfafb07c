"""Configs of diffusion transformers from the shapes of their tensors, under diffusers' names."""

from __future__ import annotations

import math
import re
from typing import Any

from ovforge.errors import ModelError
from ovforge_diffusers.header import Shapes

__all__ = ["ZERO_TIMESTEP", "scheduler_config", "transformer_config"]

ZERO_TIMESTEP = "__index_timestep_zero__"
"""ComfyUI's mark of Qwen-Image-Edit-2511: pictures beside the latents have no noise."""


def transformer_config(kind: str, own: Shapes) -> dict[str, Any]:
    """Return the config of a transformer or its ControlNet, of class `kind`.

    Raises ModelError if a tensor is missing that tells of it.
    """
    try:
        return {"_class_name": kind, **_CONFIGS[kind](own)}
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"its tensors are not those of a {kind}: {error}", hint="The file may be damaged: fetch it again."
        ) from error


def _two_streams(own: Shapes, head: int) -> dict[str, Any]:
    """Return what FLUX.1 and FLUX.2 have in common, with heads of `head` channels."""
    hidden, channels = own["x_embedder.weight"][:2]
    given = own["proj_out.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": given if given != channels else None,
        "num_layers": _blocks(own, "transformer_blocks"),
        "num_single_layers": _blocks(own, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["context_embedder.weight"][1],
    }


def _flux(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        **_two_streams(own, head),
        "pooled_projection_dim": own["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in own,
        # An eighth of a head's channels for the first id, the rest in halves for rows and columns: 16, 56, 56 of 128.
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _sd3(own: Shapes) -> dict[str, Any]:
    hidden, channels, patch, _ = own["pos_embed.proj.weight"]
    normed = "transformer_blocks.0.attn.norm_q.weight"
    head = own[normed][0] if normed in own else 64
    dual = {int(m[1]) for name in own if (m := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": own["proj_out.weight"][0] // patch**2,
        "num_layers": _blocks(own, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["context_embedder.weight"][1],
        "caption_projection_dim": own["context_embedder.weight"][0],
        "pooled_projection_dim": own["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(own["pos_embed.pos_embed"][1]),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if normed in own else None,
    }


def _qwenimage(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    hidden, channels = own["img_in.weight"][:2]
    layered = "time_text_embed.addition_t_embedding.weight" in own
    return {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": own["proj_out.weight"][0] // 4,
        "num_layers": _blocks(own, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["txt_in.weight"][1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],  # as those of FLUX.1
        "zero_cond_t": ZERO_TIMESTEP in own,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _flux2(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    hidden = own["x_embedder.weight"][0]
    return {
        **_two_streams(own, head),
        "timestep_guidance_channels": own["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": own["transformer_blocks.0.ff.linear_out.weight"][1] / hidden,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in own,
        "axes_dims_rope": [head // 4] * 4,
    }


def _zimage(own: Shapes) -> dict[str, Any]:
    head = own["layers.0.attention.norm_q.weight"][0]
    hidden, patch = own["all_x_embedder.2-1.weight"][:2]
    return {
        "in_channels": patch // 4,
        "dim": hidden,
        "n_layers": _blocks(own, "layers"),
        "n_refiner_layers": _blocks(own, "noise_refiner"),
        "n_heads": hidden // head,
        "n_kv_heads": own["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": own["cap_embedder.1.weight"][1],
        # A quarter of a head's channels for the first place, the rest in halves for rows and columns: 32, 48, 48.
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def _lumina2(own: Shapes) -> dict[str, Any]:
    head = own["layers.0.attn.norm_q.weight"][0]
    hidden, patch = own["x_embedder.weight"][:2]
    inner = own["layers.0.feed_forward.linear_1.weight"][0]
    rounded = 256 * -(-4 * hidden // 256)
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": patch // 4,
        "out_channels": own["norm_out.linear_2.weight"][0] // 4
        if own["norm_out.linear_2.weight"][0] != patch
        else None,
        "hidden_size": hidden,
        "num_layers": _blocks(own, "layers"),
        "num_refiner_layers": _blocks(own, "noise_refiner"),
        "num_attention_heads": hidden // head,
        "num_kv_heads": own["layers.0.attn.to_k.weight"][0] // head,
        # Four times the width, as published, or a multiplier that gives the width there is.
        "multiple_of": 256 if inner == rounded else 1,
        "ffn_dim_multiplier": None if inner == rounded else (inner + 0.5) / (4 * hidden),
        "axes_dim_rope": [head // 3] * 3,
        "cap_feat_dim": own["time_caption_embed.caption_embedder.1.weight"][1],
    }


def _sd3_controlnet(own: Shapes) -> dict[str, Any]:
    """Return the config of Stability's for 3.5 large, which take tokens and no text, or of others."""
    hidden, condition, patch, _ = own["pos_embed_input.proj.weight"]
    embeds, reads = "pos_embed.proj.weight" in own, "context_embedder.weight" in own
    channels = own["pos_embed.proj.weight"][1] if embeds else condition
    normed, places = "transformer_blocks.0.attn.norm_q.weight", own.get("pos_embed.pos_embed")
    head = own[normed][0] if normed in own else 64
    dual = {int(m[1]) for name in own if (m := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "extra_conditioning_channels": condition - channels,
        "num_layers": _blocks(own, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["context_embedder.weight"][1] if reads else None,
        "caption_projection_dim": own["context_embedder.weight"][0] if reads else hidden,
        "pooled_projection_dim": own["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(places[1]) if places else 192,
        "pos_embed_type": "sincos" if places else None,
        "use_pos_embed": embeds,
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if normed in own else None,
        "force_zeros_for_pooled_projection": reads,
    }


def _flux_controlnet(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    hidden, channels = own["x_embedder.weight"][:2]
    modes, hint = own.get("controlnet_mode_embedder.weight"), own.get("input_hint_block.conv_out.weight")
    singles = any(name.startswith("single_transformer_blocks.") for name in own)
    return {
        "patch_size": math.isqrt(channels // hint[0]) if hint else 1,
        "in_channels": channels,
        "num_layers": _blocks(own, "transformer_blocks"),
        "num_single_layers": _blocks(own, "single_transformer_blocks") if singles else 0,
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["context_embedder.weight"][1],
        "pooled_projection_dim": own["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in own,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "num_mode": modes[0] if modes else None,
        "conditioning_embedding_channels": hint[0] if hint else None,
    }


def _qwenimage_controlnet(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    hidden, channels = own["img_in.weight"][:2]
    return {
        "in_channels": channels,
        "num_layers": _blocks(own, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["txt_in.weight"][1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
        "extra_condition_channels": own["controlnet_x_embedder.weight"][1] - channels,
    }


def _zimage_controlnet(own: Shapes) -> dict[str, Any]:
    """Return the config of one of the first kind, which leaves the transformer's refiners alone.

    Its layers stand at even distances among the 30 of the published transformer.
    """
    head = own["control_layers.0.attention.norm_q.weight"][0]
    hidden, patch = own["control_all_x_embedder.2-1.weight"][:2]
    layers = _blocks(own, "control_layers")
    return {
        "control_layers_places": [number * (30 // layers) for number in range(layers)],
        "control_refiner_layers_places": None,
        "control_in_dim": patch // 4,
        "add_control_noise_refiner": None,
        "dim": hidden,
        "n_refiner_layers": _blocks(own, "control_noise_refiner"),
        "n_heads": hidden // head,
        "n_kv_heads": own["control_layers.0.attention.to_k.weight"][0] // head,
    }


def _ltx(own: Shapes) -> dict[str, Any]:
    hidden, channels = own["proj_in.weight"]
    heads = 32  # of all that are published: 64 channels each, or 128
    return {
        "in_channels": channels,
        "out_channels": own["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "cross_attention_dim": own["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": _blocks(own, "transformer_blocks"),
        "caption_channels": own["caption_projection.linear_1.weight"][1],
    }


_CONFIGS = {
    "ZImageControlNetModel": _zimage_controlnet,
    "SD3ControlNetModel": _sd3_controlnet,
    "FluxControlNetModel": _flux_controlnet,
    "QwenImageControlNetModel": _qwenimage_controlnet,
    "LTXVideoTransformer3DModel": _ltx,
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": _zimage,
    "Lumina2Transformer2DModel": _lumina2,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwenimage,
}


def _blocks(own: Shapes, stem: str) -> int:
    """Return how many blocks there are: one more than the highest number."""
    return 1 + max(int(m[1]) for name in own if (m := re.match(rf"{stem}\.(\d{{1,4}})\.", name)))


def scheduler_config(kind: str, config: dict[str, Any], vae: dict[str, Any]) -> dict[str, Any]:
    """Return scheduler_config.json of the published models, {} standing for an autoencoder that is not there.

    FLUX.1 schnell is the one without guidance; LTX-Video has no shift from 0.9.5 on, which its autoencoder tells.
    """
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    shifts = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
    if kind == "QwenImageTransformer2DModel":
        return {**plain, **_QWENIMAGE_SHIFTS}
    if kind == "Lumina2Transformer2DModel":
        return {**plain, "shift": 6.0}
    if kind == "LTXVideoTransformer3DModel":
        later = "LTXVideo095DownBlock3D" in vae.get("down_block_types", ())
        return {**plain, "shift": 1.0} if later else {**plain, **_LTX_SHIFTS}
    if kind == "Flux2Transformer2DModel":
        return {**plain, **shifts, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
    if kind != "FluxTransformer2DModel":
        return plain
    dynamic = config["guidance_embeds"]
    return {**plain, **shifts, "shift": 3.0 if dynamic else 1.0, "use_dynamic_shifting": dynamic}


_LTX_SHIFTS = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
}
_QWENIMAGE_SHIFTS = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
