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
    """Return the config of a transformer of class `kind`. Raises ModelError if a tensor is missing that tells of it."""
    try:
        return {"_class_name": kind, **_CONFIGS[kind](own)}
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"its tensors are not those of a {kind}: {error}", hint="The file may be damaged: fetch it again."
        ) from error


def _flux(own: Shapes) -> dict[str, Any]:
    head = own["transformer_blocks.0.attn.norm_q.weight"][0]
    hidden, channels = own["x_embedder.weight"][:2]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": own["proj_out.weight"][0] if own["proj_out.weight"][0] != channels else None,
        "num_layers": _blocks(own, "transformer_blocks"),
        "num_single_layers": _blocks(own, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": own["context_embedder.weight"][1],
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


_CONFIGS = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwenimage,
}


def _blocks(own: Shapes, stem: str) -> int:
    """Return how many blocks there are: one more than the highest number."""
    return 1 + max(int(m[1]) for name in own if (m := re.match(rf"{stem}\.(\d{{1,4}})\.", name)))


def scheduler_config(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return scheduler_config.json of the published models: FLUX.1 schnell is the one without guidance."""
    plain = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    if kind == "QwenImageTransformer2DModel":
        return {**plain, **_QWENIMAGE_SHIFTS}
    if kind != "FluxTransformer2DModel":
        return plain
    dynamic = config["guidance_embeds"]
    shifts = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
    return {**plain, **shifts, "shift": 3.0 if dynamic else 1.0, "use_dynamic_shifting": dynamic}


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
