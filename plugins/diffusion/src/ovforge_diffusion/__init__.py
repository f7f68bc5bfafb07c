"""Stable Diffusion (Rombach et al. 2022, Esser et al. 2024), FLUX.1 and Z-Image on OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, GraphTransformExtension, Phase, TaskExtension

_CONTROLS = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_3")
_TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
_DENOISERS = ("unet", "transformer")
_VISION = ("vision_encoder",)
_PREVIEW = ("preview_decoder",)
_ENCODER = ("vae_encoder",)
"""Makes latents of what ControlNets of transformers are shown."""
# Layers are told apart by what they add to the streams, before ControlNets add to them, too.
_TRANSFORMS = ("layer-skipping", "controlnet-inputs", "exact-timesteps", "fold-upsample")
_SHALLOW = ("unet_shallow", "transformer_shallow")
_INTERVALS = ({"guidance_stop": 0.8}, {"guidance_stop": 0.5}, {"guidance_start": 0.2, "guidance_stop": 0.8})
_OPTIONAL = ("guidance-embedding",)


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Text to image, image to image, inpainting; text and images to videos."""
    yield TaskExtension(
        name="text-to-image",
        summary="Make pictures from a prompt",
        config="ovforge_diffusion.inputs:DiffusionOptions",
        inputs="ovforge_diffusion.inputs:TextToImageInputs",
        result="ovforge.model:ImagesResult",
        factory="ovforge_diffusion.tasks:TextToImage",
        roles=("vae_decoder",),
        one_of=_DENOISERS,
        optional_roles=(*_SHALLOW, *_TEXT, *_CONTROLS, *_ENCODER, *_PREVIEW),
        transforms=_TRANSFORMS,
        optional_transforms=_OPTIONAL,
        tunings=_INTERVALS,
    )
    yield TaskExtension(
        name="image-to-image",
        summary="Change a picture by a prompt",
        config="ovforge_diffusion.inputs:DiffusionOptions",
        inputs="ovforge_diffusion.inputs:ImageToImageInputs",
        result="ovforge.model:ImagesResult",
        factory="ovforge_diffusion.tasks:ImageToImage",
        roles=("vae_encoder", "vae_decoder"),
        one_of=_DENOISERS,
        optional_roles=(*_SHALLOW, *_TEXT, *_VISION, *_CONTROLS, *_PREVIEW),
        transforms=_TRANSFORMS,
        optional_transforms=_OPTIONAL,
        tunings=_INTERVALS,
    )
    yield TaskExtension(
        name="inpainting",
        summary="Paint a masked part of a picture anew",
        config="ovforge_diffusion.inputs:DiffusionOptions",
        inputs="ovforge_diffusion.inputs:InpaintingInputs",
        result="ovforge.model:ImagesResult",
        factory="ovforge_diffusion.tasks:Inpainting",
        roles=("vae_encoder", "vae_decoder"),
        one_of=_DENOISERS,
        optional_roles=(*_SHALLOW, *_TEXT, *_VISION, *_CONTROLS, *_PREVIEW),
        transforms=_TRANSFORMS,
        optional_transforms=_OPTIONAL,
        tunings=_INTERVALS,
    )
    yield TaskExtension(
        name="text-to-video",
        summary="Make videos from a prompt",
        config="ovforge_diffusion.video.inputs:VideoOptions",
        inputs="ovforge_diffusion.video.inputs:TextToVideoInputs",
        result="ovforge_diffusion.video.result:VideosResult",
        factory="ovforge_diffusion.video.tasks:TextToVideo",
        roles=("transformer", "vae_decoder"),
        optional_roles=("transformer_shallow", "text_encoder", "tokenizer"),
        transforms=("exact-timesteps",),
        tunings=_INTERVALS,
    )
    yield TaskExtension(
        name="image-to-video",
        summary="Make videos from a prompt and their first frame",
        config="ovforge_diffusion.video.inputs:VideoOptions",
        inputs="ovforge_diffusion.video.inputs:ImageToVideoInputs",
        result="ovforge_diffusion.video.result:VideosResult",
        factory="ovforge_diffusion.video.tasks:ImageToVideo",
        roles=("transformer", "vae_encoder", "vae_decoder"),
        optional_roles=("transformer_shallow", "text_encoder", "tokenizer"),
        transforms=("exact-timesteps",),
        tunings=_INTERVALS,
    )

    yield TaskExtension(
        name="video-to-video",
        summary="Make videos from a prompt, and from pictures and videos at any of their frames",
        config="ovforge_diffusion.video.inputs:VideoOptions",
        inputs="ovforge_diffusion.video.inputs:VideoToVideoInputs",
        result="ovforge_diffusion.video.result:VideosResult",
        factory="ovforge_diffusion.video.tasks:VideoToVideo",
        roles=("transformer", "vae_encoder", "vae_decoder"),
        optional_roles=("transformer_shallow", "text_encoder", "tokenizer", "latent_upsampler"),
        transforms=("video-places", "exact-timesteps"),
        tunings=_INTERVALS,
    )
    yield TaskExtension(
        name="upsample-video",
        summary="Make videos, or latents to refine, of twice the sides",
        config="ovforge_diffusion.video.inputs:UpsampleVideoOptions",
        inputs="ovforge_diffusion.video.inputs:UpsampleVideoInputs",
        result="ovforge_diffusion.video.result:VideosResult",
        factory="ovforge_diffusion.video.upsampling:UpsampleVideo",
        roles=("latent_upsampler", "vae_decoder"),
        optional_roles=("vae_encoder",),
        transforms=("exact-timesteps",),
    )


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """Exact changes to the models, and step-cache and token-merging, which approximate."""
    yield GraphTransformExtension(
        name="clip-skip",
        summary="Leave the last layers of the text encoders out",
        config="ovforge_diffusion.graph.clip_skip:ClipSkipOptions",
        factory="ovforge_diffusion.graph.clip_skip:ClipSkip",
        phase=Phase.STRUCTURE,
        recompute=True,
    )
    yield GraphTransformExtension(
        name="controlnet-inputs",
        summary="Give the denoiser the inputs that ControlNets add to",
        factory="ovforge_diffusion.graph.controlnet_inputs:ControlNetInputs",
        phase=Phase.STRUCTURE,
        recompute=True,
    )
    yield GraphTransformExtension(
        name="exact-timesteps",
        summary="Let denoisers take timesteps with fractions, and have them exactly on any device",
        factory="ovforge_diffusion.graph.exact_timesteps:ExactTimesteps",
        phase=Phase.STRUCTURE,
        recompute=True,
    )
    yield GraphTransformExtension(
        name="layer-skipping",
        summary="Let rows of a batch leave layers of a transformer out",
        factory="ovforge_diffusion.graph.layer_skipping:LayerSkipping",
        phase=Phase.STRUCTURE,
        recompute=True,
    )
    yield GraphTransformExtension(
        name="video-places",
        summary="Tell LTX-Video's transformer where each token of a video is",
        factory="ovforge_diffusion.graph.video_places:VideoPlaces",
        phase=Phase.STRUCTURE,
        recompute=True,
    )
    yield GraphTransformExtension(
        name="step-cache",
        summary="Run the inner part of the denoiser only in some steps (approximates)",
        config="ovforge_diffusion.graph.step_cache:StepCacheOptions",
        factory="ovforge_diffusion.graph.step_cache:StepCache",
        phase=Phase.LAYOUT,
        recompute=True,
        approximates=True,
        tunings=(
            {"interval": 2},
            {"interval": 3},
            {"interval": 3, "order": 1},
            {"interval": 3, "depth": 2},
            {"interval": 5, "depth": 2},
            {"threshold": 0.05},
            {"threshold": 0.15},
        ),
    )
    yield GraphTransformExtension(
        name="token-merging",
        summary="Let the attention of the UNet work on fewer tokens (approximates)",
        config="ovforge_diffusion.graph.token_merging:TokenMergingOptions",
        factory="ovforge_diffusion.graph.token_merging:TokenMerging",
        phase=Phase.LAYOUT,
        recompute=True,
        approximates=True,
        tunings=(
            {"ratio": 0.3},
            {"ratio": 0.5},
            {"ratio": 0.3, "max_downsample": 2},
            {"ratio": 0.5, "max_downsample": 2},
        ),
    )
    yield GraphTransformExtension(
        name="fold-upsample",
        summary="Fold up-sampling into the convolution after it",
        factory="ovforge_diffusion.graph.fold_upsample:FoldUpsample",
        phase=Phase.LAYOUT,
        recompute=True,
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """The pipeline in one command, and as one graph."""
    yield CommandExtension(
        name="generate",
        summary="Make pictures with a diffusion model in one command",
        factory="ovforge_diffusion.generate:generate",
    )
    yield CommandExtension(
        name="single-graph",
        summary="Write a text-to-image pipeline as one OpenVINO graph",
        factory="ovforge_diffusion.single_graph.command:single_graph",
    )
