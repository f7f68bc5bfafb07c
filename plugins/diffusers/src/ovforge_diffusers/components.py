"""Which models of a diffusion transformer's pipeline a file holds, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ovforge.model import Source
from ovforge_diffusers.gguf_file import read_gguf_header
from ovforge_diffusers.header import Part, Shapes, is_adapter, read_header

__all__ = ["CLIP", "TEXT_ENCODERS", "Contents", "find_components", "is_gguf", "read_contents"]

GGUF_SUFFIX = ".gguf"
CLIP = "CLIPTextModelWithProjection"
"""Class that stands for CLIP's text encoders; a family may take them without their projection."""

TEXT_ENCODERS = (CLIP, "T5EncoderModel", "Qwen3Model", "Gemma2Model", "Qwen2_5_VLForConditionalGeneration")

_MODEL = "model.diffusion_model."
_BESIDE_TRANSFORMER = ("first_stage_model.", "vae.")
_ENCODERS = re.compile(r"text_encoders\.[^.]{1,64}\.(?:transformer\.)?")
"""Where ComfyUI keeps text encoders in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file says it holds: shapes of tensors by their names, and metadata (numbers and lists, too, in GGUF)."""

    shapes: Shapes
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Form:
    """A naming of a class: names that tell, and names that only others have."""

    kind: str
    naming: str
    marks: tuple[str, ...]
    others: tuple[str, ...] = ()


_CONTROL = "controlnet_blocks.0.weight"
"""What the ControlNets of all transformers have."""

_TRANSFORMERS: tuple[tuple[_Form, tuple[str, ...]], ...] = (
    (
        _Form(
            "Flux2Transformer2DModel",
            "original",
            ("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "Flux2Transformer2DModel",
            "diffusers",
            ("double_stream_modulation_img.linear.weight", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"),
        ),
        (_MODEL, "", "transformer."),
    ),
    (
        _Form(
            "FluxTransformer2DModel",
            "original",
            ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight", "txt_in.weight"),
            (_CONTROL,),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "FluxTransformer2DModel",
            "diffusers",
            ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
            (_CONTROL,),
        ),
        ("", "transformer."),
    ),
    (
        _Form(
            "SD3Transformer2DModel",
            "original",
            ("joint_blocks.0.context_block.attn.qkv.weight", "y_embedder.mlp.0.weight", "pos_embed"),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "SD3Transformer2DModel",
            "diffusers",
            ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.pos_embed", "norm_out.linear.weight"),
        ),
        ("", "transformer."),
    ),
    (
        _Form(
            "QwenImageTransformer2DModel",
            "diffusers",
            ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight", "proj_out.weight"),
        ),
        (_MODEL, "", "transformer."),
    ),
    (
        _Form(
            "ZImageTransformer2DModel",
            "original",
            ("layers.0.attention.qkv.weight", "noise_refiner.0.attention.qkv.weight", "cap_pad_token", "x_pad_token"),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "ZImageTransformer2DModel",
            "diffusers",
            ("all_x_embedder.2-1.weight", "layers.0.attention.to_q.weight", "cap_pad_token", "x_pad_token"),
        ),
        (_MODEL, "", "transformer."),
    ),
    (
        _Form(
            "Lumina2Transformer2DModel",
            "original",
            ("layers.0.attention.qkv.weight", "noise_refiner.0.attention.qkv.weight", "cap_embedder.1.weight"),
            ("cap_pad_token",),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "Lumina2Transformer2DModel",
            "diffusers",
            ("time_caption_embed.caption_embedder.1.weight", "layers.0.attn.to_q.weight"),
        ),
        (_MODEL, "", "transformer."),
    ),
    (
        _Form(
            "LTXVideoTransformer3DModel",
            "original",
            ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.q_norm.weight"),
            ("audio_patchify_proj.weight",),
        ),
        (_MODEL, ""),
    ),
    (
        _Form(
            "LTXVideoTransformer3DModel",
            "diffusers",
            ("proj_in.weight", "time_embed.linear.weight", "transformer_blocks.0.attn1.norm_q.weight"),
            ("audio_proj_in.weight",),
        ),
        (_MODEL, "", "transformer."),
    ),
    *(
        (form, (_MODEL, "", "transformer."))
        for form in (
            _Form(
                "SanaTransformer2DModel",
                "original",
                ("blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.cross_attn.kv_linear.weight"),
                ("blocks.0.mlp.t_conv.weight",),
            ),
            _Form(
                "SanaTransformer2DModel",
                "diffusers",
                ("transformer_blocks.0.ff.conv_inverted.weight", "patch_embed.proj.weight"),
                (_CONTROL, "transformer_blocks.0.ff.conv_temp.weight"),
            ),
            _Form(
                "PixArtTransformer2DModel",
                "original",
                ("blocks.0.mlp.fc1.weight", "blocks.0.cross_attn.kv_linear.weight", "y_embedder.y_embedding"),
                ("blocks.0.attn_temp.qkv.weight",),
            ),
            _Form(
                "PixArtTransformer2DModel",
                "diffusers",
                ("adaln_single.linear.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn2.to_k.weight"),
                (_CONTROL,),
            ),
        )
    ),
)
"""Forms of transformers, and the prefixes that they may have. The last four are refused by their names."""

_CONTROLNETS = (
    _Form("SD3ControlNetModel", "diffusers", (_CONTROL, "pos_embed_input.proj.weight")),
    _Form("FluxControlNetModel", "diffusers", (_CONTROL, "controlnet_x_embedder.weight", "x_embedder.weight")),
    _Form("QwenImageControlNetModel", "diffusers", (_CONTROL, "controlnet_x_embedder.weight", "img_in.weight")),
    _Form(
        "ZImageControlNetModel",
        "diffusers",
        ("control_all_x_embedder.2-1.weight", "control_layers.0.after_proj.weight"),
    ),
    _Form("ControlNet", "original", (_CONTROL,)),
)
"""The last one is any other's, to be refused by its name."""

_AUTOENCODERS = (
    _Form(
        "AutoencoderKL",
        "original",
        (
            "encoder.down.0.block.0.conv1.weight",
            "encoder.conv_in.weight",
            "decoder.conv_in.weight",
            "decoder.conv_out.weight",
        ),
        ("bn.running_mean",),
    ),
    _Form(
        "AutoencoderKL",
        "diffusers",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"),
        ("bn.running_mean",),
    ),
    _Form(
        "AutoencoderKLFlux2",
        "original",
        ("encoder.down.0.block.0.conv1.weight", "bn.running_mean", "bn.running_var"),
    ),
    _Form(
        "AutoencoderKLFlux2",
        "diffusers",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "bn.running_mean", "bn.running_var"),
    ),
    _Form(
        "AutoencoderKLQwenImage",
        "original",
        ("encoder.downsamples.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma", "conv2.weight"),
    ),
    _Form(
        "AutoencoderKLQwenImage",
        "diffusers",
        ("encoder.down_blocks.0.norm1.gamma", "decoder.mid_block.resnets.0.norm1.gamma", "post_quant_conv.weight"),
    ),
    _Form(
        "AutoencoderKLLTXVideo",
        "original",
        ("encoder.down_blocks.0.res_blocks.0.conv1.conv.weight", "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
         "per_channel_statistics.std-of-means"),
    ),
    _Form(
        "AutoencoderKLLTXVideo",
        "diffusers",
        ("encoder.down_blocks.0.resnets.0.conv1.conv.weight", "decoder.mid_block.resnets.0.conv1.conv.weight",
         "latents_std"),
    ),
)  # fmt: skip

_UPSAMPLER = _Form(
    "LTXLatentUpsamplerModel",
    "diffusers",
    (
        "initial_conv.weight",
        "res_blocks.0.conv1.weight",
        "upsampler.0.weight",
        "post_upsample_res_blocks.0.conv1.weight",
    ),
)

_CLIP_MARKS = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
               "encoder.layers.0.mlp.fc1.weight", "final_layer_norm.weight")  # fmt: skip
_TEXTS = (
    _Form(CLIP, "transformers", tuple(f"text_model.{mark}" for mark in _CLIP_MARKS)),
    _Form(CLIP, "transformers", _CLIP_MARKS),
    _Form(
        "T5EncoderModel",
        "transformers",
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
            "encoder.final_layer_norm.weight",
        ),
        ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    ),
    _Form(
        "T5EncoderModel",
        "llama.cpp",
        ("enc.blk.0.attn_q.weight", "enc.blk.0.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight", "token_embd.weight"),
        ("enc.blk.1.attn_rel_b.weight",),
    ),
    *(
        _Form(
            "Qwen3Model",
            "transformers",
            tuple(
                level + mark
                for mark in ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.mlp.gate_proj.weight")
            ),
            (f"{level}layers.0.post_feedforward_layernorm.weight", "visual.blocks.0.attn.qkv.weight"),
        )
        for level in ("model.", "")
    ),
    _Form(
        "Qwen3Model",
        "llama.cpp",
        ("token_embd.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate.weight", "output_norm.weight"),
        ("blk.0.post_ffw_norm.weight", "blk.0.post_attention_norm.weight"),
    ),
    *(
        _Form(
            "Gemma2Model",
            "transformers",
            tuple(
                level + mark
                for mark in (
                    "embed_tokens.weight",
                    "layers.0.pre_feedforward_layernorm.weight",
                    "layers.0.post_feedforward_layernorm.weight",
                )
            ),
            (f"{level}layers.0.self_attn.q_norm.weight",),
        )
        for level in ("model.", "")
    ),
    *(
        _Form(
            "Qwen2_5_VLForConditionalGeneration",
            "transformers",
            (
                f"{text}embed_tokens.weight",
                f"{text}layers.0.self_attn.k_proj.bias",
                f"{vision}blocks.0.mlp.gate_proj.weight",
                f"{vision}merger.mlp.0.weight",
            ),
        )
        for text, vision in (("model.", "visual."), ("model.language_model.", "model.visual."))
    ),
    _Form(
        "Qwen2_5_VLForConditionalGeneration",
        "llama.cpp",
        ("token_embd.weight", "blk.0.attn_k.bias", "blk.0.ffn_gate.weight", "output_norm.weight"),
        ("blk.0.attn_q_norm.weight",),
    ),
    _Form(
        "Qwen2_5_VLForConditionalGeneration",
        "mmproj",
        ("v.patch_embd.weight", "v.patch_embd.weight.1", "v.blk.0.ffn_gate.weight", "v.post_ln.weight", "mm.0.weight"),
    ),
)
"""Of CLIP and T5, of language models, each as it is stored alone, and with its level `model.` or without."""


def is_gguf(path: str) -> bool:
    """Say whether a file is GGUF, by its name."""
    return PurePosixPath(path).suffix == GGUF_SUFFIX


def read_contents(source: Source, path: str) -> Contents:
    """Read the header of a safetensors or GGUF file. Raises ModelError for a file that is damaged."""
    if is_gguf(path):
        gguf = read_gguf_header(source, path)
        return Contents({name: entry.shape for name, entry in gguf.tensors.items()}, gguf.metadata)
    header = read_header(source, path)
    return Contents(header.shapes, header.metadata)


def find_components(shapes: Shapes) -> dict[str, Part]:
    """Return the models of a file: "transformer", "vae", "controlnet", "latent_upsampler", and text encoders by prefix.

    {} for anything else, and for an adapter. An autoencoder of four channels is one of Stable Diffusion's older
    families: `header.find_parts` knows it.
    """
    if is_adapter(shapes):
        return {}
    found: dict[str, Part] = {}
    for form, prefixes in _TRANSFORMERS:
        for prefix in prefixes:
            if "transformer" not in found and _fits(form, prefix, shapes):
                found["transformer"] = Part(form.kind, prefix, form.naming)
    for form in _CONTROLNETS:
        if "controlnet" not in found and _fits(form, "", shapes):
            found["controlnet"] = Part(form.kind, "", form.naming)
    for form in _AUTOENCODERS:
        for prefix in (*_BESIDE_TRANSFORMER, ""):
            if "vae" not in found and _fits(form, prefix, shapes) and _known_latents(form, prefix, shapes):
                found["vae"] = Part(form.kind, prefix, form.naming)
    if _fits(_UPSAMPLER, "", shapes):
        found["latent_upsampler"] = Part(_UPSAMPLER.kind, "", _UPSAMPLER.naming)
    for prefix in _text_prefixes(shapes):
        for form in _TEXTS:
            if prefix not in found and _fits(form, prefix, shapes):
                found[prefix] = Part(form.kind, prefix, form.naming)
    return found


def _fits(form: _Form, prefix: str, shapes: Shapes) -> bool:
    there = all(prefix + mark in shapes for mark in form.marks)
    return there and not any(prefix + mark in shapes for mark in form.others)


def _known_latents(form: _Form, prefix: str, shapes: Shapes) -> bool:
    """Say whether an AutoencoderKL is one of 16 channels, over pictures."""
    if form.kind != "AutoencoderKL":
        return True
    shape = shapes[prefix + "decoder.conv_in.weight"]
    return len(shape) == 4 and shape[1] == 16


def _text_prefixes(shapes: Shapes) -> Iterator[str]:
    yield ""
    yield from sorted({match[0] for name in shapes if (match := _ENCODERS.match(name))}, reverse=True)
