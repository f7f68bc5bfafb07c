"""What each submodel takes and gives: names, types and layouts of optimum-intel's export (version 2.2).

text_encoder   input_ids i64 [batch, tokens] -> last_hidden_state, pooler_output (, hidden_states.0, ...)
               with projection: text_embeds, last_hidden_state (, hidden_states.0, ...); T5: last_hidden_state
               alone: whatever a pipeline may take of it, which are text_embeds, last_hidden_state, pooler_output and
               hidden_states.0, ... of CLIP, and last_hidden_state and hidden_states.0, ... of Qwen3 and Gemma 2
               Qwen3: input_ids, attention_mask i64 [batch, tokens] -> last_hidden_state (for Z-Image of the last layer
               but one; for FLUX.2 of the last, with hidden_states.0, ...)
               Gemma 2, Qwen2.5-VL: input_ids, attention_mask i64 [batch, tokens] -> last_hidden_state (for Lumina-Image
               2.0 hidden_states.N alone, before the last layer)
               Qwen2.5-VL of Qwen-Image-Edit besides: position_ids i64 [3, batch, tokens], visual_states f32 [batch,
               tokens, width]
vision_encoder pixel_values f32 [windows, patches, values], attention_mask i64 [windows, patches], position_ids i64
               [windows, patches, 2] -> last_hidden_state
unet           sample f32 [batch, channels, height, width], timestep i64 [1 or batch],
               encoder_hidden_states f32 [batch, tokens, width] (, timestep_cond f32 [batch, width])
               (, text_embeds f32 [batch, width], time_ids f32 [batch, 5 or 6]) -> out_sample
transformer    SD3: hidden_states f32 [batch, channels, height, width], timestep f32 [batch],
               encoder_hidden_states f32 [batch, tokens, width], pooled_projections f32 [batch, width] -> out_sample
               FLUX: hidden_states f32 [batch, patches, channels * 4], timestep f32 [batch] from 0 to 1,
               encoder_hidden_states, pooled_projections, txt_ids f32 [tokens, 3], img_ids f32 [patches, 3]
               (, guidance f32 [batch]) -> out_sample
               FLUX.2: likewise without pooled_projections; txt_ids f32 [batch, tokens, 4],
               img_ids f32 [batch, patches, 4]
               Z-Image: hidden_states f32 [batch, channels, height, width], timestep f32 [batch] from 0 (noise) to 1,
               encoder_hidden_states f32 [batch, tokens, width], encoder_attention_mask f32 [batch, tokens] (0, or
               negative for what fills up), txt_ids i64 [batch, tokens, 3], img_ids i64 [batch, patches, 3] -> sample
               Sana: hidden_states f32 [batch, channels, height, width], timestep f32 [batch],
               encoder_hidden_states f32 [batch, tokens, width], encoder_attention_mask f32 [batch, tokens] (1, or 0
               for what fills up) (, guidance f32 [batch] of Sana-Sprint) -> out_sample
               PixArt: likewise
               Lumina-Image 2.0: likewise, timestep from 0 (noise) to 1, and txt_ids i64 [batch, tokens, 3],
               img_ids i64 [batch, patches, 3] -> sample
               Qwen-Image: hidden_states f32 [batch, patches, channels * 4], encoder_hidden_states f32 [batch, tokens,
               width], encoder_hidden_states_mask i64 [batch, tokens], timestep f32 [batch] from 0 to 1, height, width
               i64 [], in patches (of Qwen-Image-Edit, and alone: [pictures], the latents first) -> out_hidden_states
               LTX-Video: hidden_states f32 [batch, tokens, channels], encoder_hidden_states, encoder_attention_mask
               i64 [batch, tokens], width, height, num_frames i64 [] of latents, timestep f32 [batch, tokens or 1],
               rope_interpolation_scale f32 [3] (seconds of a latent frame, pixels of a latent) -> out_sample
controlnet     the UNet's inputs but timestep_cond, controlnet_cond f32 [batch, 3, height * 8, width * 8] from 0 to 1
               -> down_block_res_sample_0, ..., mid_block_res_sample, not scaled (names of OpenVINO's notebooks)
               SD3, FLUX, Qwen-Image, Sana: what the transformer takes, and controlnet_cond, latents of the condition as
               the transformer takes its own, or for XLabs' FLUX f32 [batch, 3, height * 8, width * 8] from -1 to 1
               (, controlnet_mode i64 [batch, 1]) -> controlnet_block_samples_0, ...
               (, controlnet_single_block_samples_0, ...), not scaled
               SD3.5 large: hidden_states f32 [batch, tokens, width], which the transformer has embedded, and no text
               Z-Image: picture_tokens, tokens f32 [batch, tokens, width], time f32 [batch, width] of the transformer,
               txt_ids, img_ids, controlnet_cond (-> controlnet_refiner_samples_0, ... besides)
vae_encoder    sample f32 [batch, 3, height, width] -> latent_parameters (mean and log variance, stacked; of the tiny
               autoencoder TAESD the latents themselves)
vae_decoder    latent_sample f32 [batch, channels, height, width] -> sample
               Qwen-Image's encoder and decoder have an axis of one frame before height, LTX-Video's one of frames;
               its decoder may take timestep f32 [batch] and noise_0, ... f32 [draws, height, width]
latent_upsampler latent_sample f32 [batch, channels, frames, height, width] -> sample
"""

from __future__ import annotations

from typing import Any

from ovforge.errors import ConfigError
from ovforge_convert import Port
from ovforge_diffusers.controlnets import CONTROLNETS, controlnet_of
from ovforge_diffusers.denoisers import TRANSFORMERS, transformer
from ovforge_diffusers.ltx_upsampler import CLASS as UPSAMPLER
from ovforge_diffusers.ltx_upsampler import ltx_upsampler
from ovforge_diffusers.ltx_vae import CLASS as LTX_VAE
from ovforge_diffusers.ltx_vae import ltx_decoder, ltx_encoder
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.ports import SCALE, RuntimeOptions, Sizes, Submodel
from ovforge_diffusers.qwen2_5_vl import CLASS as QWEN2_5_VL
from ovforge_diffusers.qwen2_5_vl import language_model, vision_encoder
from ovforge_diffusers.qwenimage_vae import CLASS as QWENIMAGE_VAE
from ovforge_diffusers.qwenimage_vae import qwenimage_decoder, qwenimage_encoder
from ovforge_diffusers.texts import TEXT_ENCODERS, text_encoder
from ovforge_diffusers.unets import controlnet, unet

__all__ = ["VISION", "describe"]

VISION = "vision_encoder"
"""Role of what sees pictures for a text encoder."""


def describe(
    role: str, module: Any, options: LoaderOptions, index: dict[str, Any], context: dict[str, Any]
) -> Submodel:
    """Describe a role of a torch module.

    `context` has what belongs to other components: vae_factor, patch (latents that a denoiser takes as one, a side),
    tokens (or None), prediction_type, alone (whether it may be put into a pipeline of any kind), beside (whether a
    denoiser may see pictures beside the latents).
    Raises ModelError for a variety of the class that is not supported, ConfigError for a size that cannot be.
    """
    factor = context["vae_factor"]
    _check_size(options, factor * context["patch"])
    kind = type(module).__name__
    if kind == QWEN2_5_VL:
        return vision_encoder(module) if role == VISION else language_model(module, pictures=context["beside"])
    if kind in TEXT_ENCODERS:
        return text_encoder(module, hidden_states=_wants_states(module, index), alone=context["alone"])
    latent = Sizes(
        options.batch,
        options.height and options.height // factor,
        options.width and options.width // factor,
        context["beside"],
    )
    if kind in TRANSFORMERS:
        return transformer(module, latent)
    if kind == UPSAMPLER:
        return ltx_upsampler(module)
    if kind in CONTROLNETS:
        return controlnet_of(module, latent, factor)
    if role == "unet":
        return unet(module, latent, options.timestep, context["tokens"], index)
    if role.startswith("controlnet"):
        return controlnet(module, latent, options.timestep, context["tokens"], index)
    scale = _activation_scale(module, index, context)
    picture = Sizes(options.batch, options.height, options.width)
    if kind == LTX_VAE:
        return ltx_decoder(module, latent) if role == "vae_decoder" else ltx_encoder(module, picture, factor)
    framed = kind == QWENIMAGE_VAE
    if role == "vae_decoder":
        return qwenimage_decoder(module, latent, scale) if framed else _vae_decoder(module, latent, scale)
    encoder = qwenimage_encoder if framed else _vae_encoder
    return encoder(module, picture, factor, scale)


def _wants_states(module: Any, index: dict[str, Any]) -> bool:
    """Say whether a denoiser takes hidden states of an encoder: SDXL, SD3 (which have projections), Lumina 2."""
    if hasattr(module, "text_projection") or _second(index) == "CLIPTextModelWithProjection":
        return True
    return str(index.get("_class_name", "")).startswith("Lumina2")


def _second(index: dict[str, Any]) -> str | None:
    """Return the class of the second text encoder, None if there is none."""
    named = index.get("text_encoder_2") or [None, None]
    return named[1] if isinstance(named, list) and len(named) == 2 else None


def _check_size(options: LoaderOptions, factor: int) -> None:
    for name in ("height", "width"):
        size = getattr(options, name)
        if size is not None and size % factor:
            near = max(factor, round(size / factor) * factor)
            raise ConfigError(
                f"{size} is not a multiple of {factor}, as the model's autoencoder and patches need it",
                where=f"load.options.{name}",
                hint=f"Nearest: {near}.",
            )


def _activation_scale(module: Any, index: dict[str, Any], context: dict[str, Any]) -> RuntimeOptions:
    """Return the hint by which devices computing in float16 keep the VAE from overflowing, as in optimum-intel."""
    pipeline = str(index.get("_class_name", ""))
    if pipeline.startswith(("Flux", "ZImage", "Lumina2", "QwenImage")):
        return SCALE
    sd3 = pipeline.startswith("StableDiffusion3")
    if _second(index) and not sd3 and module.config.get("force_upcast"):
        return (("ACTIVATIONS_SCALE_FACTOR", "128.0"),)
    if pipeline.startswith("StableDiffusion") and not sd3 and context["prediction_type"] == "v_prediction":
        return (("ACTIVATIONS_SCALE_FACTOR", "8.0"),)
    return ()


def _vae_decoder(module: Any, latent: Sizes, scale: RuntimeOptions) -> Submodel:
    channels = module.config.latent_channels

    def forward(latent_sample: Any) -> tuple[Any, ...]:
        result: tuple[Any, ...] = module.decode(latent_sample, return_dict=False)
        return result

    shape = (latent.batch, channels, latent.height, latent.width)
    example = (2, channels, latent.height or 8, latent.width or 8)
    return Submodel(forward, (Port("latent_sample", shape, example),), ("sample",), scale)


def _vae_encoder(module: Any, picture: Sizes, factor: int, scale: RuntimeOptions) -> Submodel:
    channels = module.config.in_channels

    def forward(sample: Any) -> tuple[Any, ...]:
        encoded = module.encode(sample, return_dict=False)[0]
        return (getattr(encoded, "parameters", encoded),)

    shape = (picture.batch, channels, picture.height, picture.width)
    example = (2, channels, picture.height or 8 * factor, picture.width or 8 * factor)
    return Submodel(forward, (Port("sample", shape, example),), ("latent_parameters",), scale)
