"""What one call of each task takes, and how the tasks run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ovforge.model import Picture

__all__ = [
    "Control",
    "DiffusionInputs",
    "DiffusionOptions",
    "ImageToImageInputs",
    "InpaintingInputs",
    "TextToImageInputs",
]

Seed = int
Size = tuple[int, int]


def _latents(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | Path):
        base = (info.context or {}).get("base")
        path = Path(value).expanduser()
        return Path(base) / path if base else path
    raise ValueError(f"must be a path (.npy, or numbers as text) or an array, not {type(value).__name__}")


Latents = Annotated[Any, BeforeValidator(_latents), WithJsonSchema({"type": "string", "format": "path"})]

GuidanceRescale = Annotated[
    float,
    Field(ge=0, le=1, description="How far guided predictions keep the deviation of unguided ones (Lin et al. 2024)."),
]
GuidanceStart = Annotated[
    float,
    Field(ge=0, lt=1, description="Part of the steps after which guidance begins; before it a step is half the work."),
]
GuidanceStop = Annotated[
    float, Field(gt=0, le=1, description="Part of the steps after which guidance ends (Kynkaanniemi et al. 2024).")
]


class DiffusionOptions(BaseModel):
    """How the tasks run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    static: bool = Field(
        True,
        description="Compile for the size that [input] names, or the model's own, which runs faster. A call of another "
        "size then compiles once more, for any size.",
    )
    guidance: Literal["joint", "split"] = Field(
        "joint",
        description="Whether the two halves of classifier-free guidance run as one batch or in two calls.",
    )
    prompts: Literal["plain", "weighted"] = Field(
        "plain",
        description="weighted: (word:1.3), [word], [a:b:0.5], [a|b], AND, BREAK and <lora:name:0.8> in prompts mean "
        "what they mean in the AUTOMATIC1111 web UI.",
    )
    long_prompts: Literal["cut", "chunks"] = Field(
        "cut", description="What becomes of tokens that do not fit: cut off and said, or encoded in chunks of 75."
    )
    low_memory: bool = Field(
        False, description="Hold one role in memory at a time: each is compiled (or read from the cache) when needed."
    )
    raw_scheduler: bool = Field(
        False,
        description="Take the model's scheduler_config.json as it stands. By default steps_offset, clip_sample and "
        "skip_prk_steps become what diffusers' pipelines of Stable Diffusion 1 and 2 make of them.",
    )
    tile: int | None = Field(
        None,
        ge=64,
        description="Pictures larger than this many pixels a side are decoded and encoded in overlapping tiles "
        "of that size. By default, 1024 for pictures above 4 megapixels.",
    )


class Control(BaseModel):
    """A condition for a ControlNet: a picture, how strongly it counts, and in which part of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    image: Picture = Field(description="The condition, or the picture that it is made of.")
    scale: float = Field(1.0, ge=0, le=10, description="Strength of the condition.")
    start: float = Field(0.0, ge=0, le=1, description="Part of the run after which it begins to count.")
    end: float = Field(1.0, ge=0, le=1, description="Part of the run after which it counts no more.")
    mode: int | None = Field(
        None, ge=0, description="Which kind of condition it is, by the number that a union of several kinds has for it."
    )
    mask: Picture | None = Field(
        None, description="For a ControlNet for inpainting: what is painted anew, white, of the picture that stays."
    )
    around: Picture | None = Field(
        None, description="Z-Image: the picture that the mask is for, beside the condition; others take them as one."
    )
    preprocess: Literal["none", "canny"] = Field("none", description="canny: the edges of the picture, by OpenCV.")
    low: int = Field(100, ge=0, le=1000, description="Canny's lower threshold.")
    high: int = Field(200, ge=0, le=1000, description="Canny's upper threshold.")


_CONTROL = "`{}` of each `control`"
_OF_DIFFUSERS = {
    "num_inference_steps": "`steps`",
    "num_images_per_prompt": "`count`",
    "num_videos_per_prompt": "`count`",
    "generator": "`seed`",
    "mask_image": '`mask`, in the task "inpainting",',
    "image_reference": '`reference`, in the task "inpainting",',
    "control_image": "`control`",
    "control_mask": _CONTROL.format("mask"),
    "control_mode": _CONTROL.format("mode"),
    "controlnet_conditioning_scale": _CONTROL.format("scale"),
    "control_guidance_start": _CONTROL.format("start"),
    "control_guidance_end": _CONTROL.format("end"),
    "use_resolution_binning": "`resolution_binning`",
    "complex_human_instruction": "`instruction`, one text with line breaks,",
    "system_prompt": "`instruction`",
    "cfg_trunc_ratio": "`guidance_stop`",
    "clip_skip": 'the transform "clip-skip"',
    "callback_on_step_end": "`progress`, in Python,",
    "callback": "`progress`, in Python,",
    "output_type": "`decode`, for latents in place of pictures,",
    "crops_coords_top_left": "`crop`",
    "negative_crops_coords_top_left": "`negative_crop`",
    "eta": "the scheduler's option `eta`",
    "max_timesteps": "the option `max_timesteps` of the scheduler 'scm'",
    "intermediate_timesteps": "the option `intermediate_timesteps` of the scheduler 'scm'",
    **dict.fromkeys(
        ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"), "`scale` of the transform 'lora'"
    ),
}
"""Arguments of diffusers' pipelines that have another name."""

_NOT_HERE = {
    "clean_caption": "prompts are read as with clean_caption=False",
    **dict.fromkeys(("pag_scale", "pag_adaptive_scale"), "guidance by perturbed attention is not there"),
    **dict.fromkeys(
        (
            "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
            "prompt_attention_mask", "negative_prompt_attention_mask",
        ),
        "a call takes texts, not their states",
    ),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), "IP-Adapters are not there"),
    "return_dict": "a call returns one result",
    "callback_steps": "progress is told at each step",
    "callback_on_step_end_tensor_inputs": "nobody can choose what `progress` is told",
}  # fmt: skip
"""Arguments that have no counterpart here, and why."""


class DiffusionInputs(BaseModel):
    """What the tasks share. What is left out, the model's own defaults fill."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    prompt: str | list[str] = Field(description="What the picture shows; a list gives a batch.")
    negative_prompt: str | list[str] | None = Field(None, description="What it should not show.")
    prompt_2: str | list[str] | None = Field(None, description="Another prompt for the second text encoder.")
    negative_prompt_2: str | list[str] | None = Field(None, description="Likewise what it should not show.")
    prompt_3: str | list[str] | None = Field(None, description="Another prompt for the third text encoder.")
    negative_prompt_3: str | list[str] | None = Field(None, description="Likewise what it should not show.")
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    timesteps: list[float] | None = Field(
        None,
        min_length=1,
        description="The timesteps to go over, in place of steps, if the scheduler's class takes some.",
    )
    sigmas: list[float] | None = Field(
        None,
        min_length=1,
        description="Likewise levels of noise: of flows a share for each step, before any shift; of 'euler' also the "
        "one to end at.",
    )
    guidance_scale: float | None = Field(None, ge=0, description="How closely to follow the prompt.")
    true_cfg_scale: float | None = Field(
        None,
        ge=0,
        description="FLUX.1, Qwen-Image: how far to go away from the negative prompt, at two calls a step; with FLUX.1 "
        "beside guidance_scale, with Qwen-Image in its place (by default 4).",
    )
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Tokens that T5, a Qwen or Gemma 2 reads: by default 256 for SD 3 and Lumina 2, 300 for Sana and "
        "PixArt, 512 for FLUX, Z-Image and Qwen-Image. At most 512, and 1024 for Qwen-Image.",
    )
    instruction: str | None = Field(
        None,
        max_length=100_000,
        description="Sana and Lumina 2: what the language model is told before each prompt, in place of the "
        'instruction of diffusers\' pipelines. "" tells Sana nothing.',
    )
    skip_guidance_layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Stable Diffusion 3: guidance also goes away from a prediction that leaves these layers out.",
    )
    skip_layer_guidance_scale: float = Field(2.8, ge=0, description="How far it does.")
    skip_layer_guidance_start: float = Field(0.01, ge=0, le=1, description="Part of the steps after which it begins.")
    skip_layer_guidance_stop: float = Field(0.2, ge=0, le=1, description="Part of the steps at which it ends.")
    guidance_rescale: GuidanceRescale = 0.0
    guidance_start: GuidanceStart = 0.0
    guidance_stop: GuidanceStop = 1.0
    cfg_normalization: float | None = Field(
        None,
        ge=0,
        description="Z-Image: times the norm of an unguided prediction that a guided one keeps to, 0 for any. Lumina "
        "2: whether it keeps that norm along each row, 1 by default, or 0.",
    )
    cfg_truncation: float | None = Field(
        None, ge=0, le=1, description="Z-Image: the share of the picture, from 0 to 1, above which guidance ends."
    )
    resolution_binning: bool = Field(
        False,
        description="Sana and PixArt: make the picture at that size of a list which is most like it, and scale and cut "
        "it, as diffusers does by default.",
    )
    width: int | None = Field(None, ge=8, le=16384, description="Pixels.")
    height: int | None = Field(None, ge=8, le=16384, description="Pixels.")
    count: int = Field(1, ge=1, le=256, description="Pictures for each prompt.")
    seed: Seed | list[Seed] | None = Field(
        None,
        description="Random seed of the first picture; the next ones take the next numbers. Or one for each picture.",
    )
    control: list[Control] | None = Field(None, description="Conditions for the model's ControlNets, one for each.")
    latents: Latents | None = Field(
        None, description="The first noise, float32 (pictures, channels, height, width) of the latents: .npy or text."
    )
    denoising_end: float | None = Field(
        None, gt=0, lt=1, description="End at this part of the noise schedule, and give latents for a refiner."
    )
    decode: bool | None = Field(None, description="Whether to make pictures of the latents; not with denoising_end.")
    original_size: Size | None = Field(None, description="SDXL: (height, width) that the picture seems to come from.")
    target_size: Size | None = Field(None, description="SDXL: (height, width) that it is made for.")
    crop: Size = Field((0, 0), description="SDXL: (top, left) at which it seems to be cropped.")
    negative_original_size: Size | None = Field(
        None, description="SDXL: likewise for the half to avoid; from text with negative_target_size."
    )
    negative_target_size: Size | None = Field(None, description="SDXL: likewise for the half to avoid.")
    negative_crop: Size = Field((0, 0), description="SDXL: likewise, where the pipeline of diffusers looks at it.")
    aesthetic_score: float = Field(6.0, description="SDXL refiner: score of the pictures to follow.")
    negative_aesthetic_score: float = Field(2.5, description="SDXL refiner: score of those to avoid.")

    @model_validator(mode="before")
    @classmethod
    def _named_as_here(cls, value: Any) -> Any:
        """Say what an argument of diffusers' pipelines is called here, or that there is none like it."""
        names = list(value) if isinstance(value, dict) else []
        said = [f"`{name}` of diffusers is {_OF_DIFFUSERS[name]} here" for name in names if name in _OF_DIFFUSERS]
        said += [f"leave `{name}` of diffusers out: {_NOT_HERE[name]}" for name in names if name in _NOT_HERE]
        if said:
            raise ValueError("; ".join(said))
        return value

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("give at least one prompt")
        return value

    @field_validator("control", mode="before")
    @classmethod
    def _some_controls(cls, value: Any) -> Any:
        """One condition may stand alone, and a picture alone is a condition."""
        if value is None:
            return None
        each = value if isinstance(value, list | tuple) else [value]
        return [item if isinstance(item, dict | Control) else {"image": item} for item in each]


class TextToImageInputs(DiffusionInputs):
    """Inputs of text-to-image."""


class ImageToImageInputs(DiffusionInputs):
    """Inputs of image-to-image. The size is the picture's own, rounded down to the autoencoder's grid.

    Models that edit a picture which they see have a size of their own.
    """

    image: list[Picture] | None = Field(
        None,
        min_length=1,
        description="The picture to start from; a list gives one for each prompt, or all that FLUX.2 or "
        "Qwen-Image-Edit is to see. Or give latents.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How far to go from it; 1 keeps next to nothing. By default 0.8; 0.3 for SDXL, 0.6 for SD 3, FLUX, "
        "Z-Image, Qwen-Image and Sana-Sprint. Not for models that see the picture: FLUX.1 Kontext, FLUX.2, "
        "Qwen-Image-Edit.",
    )
    denoising_start: float | None = Field(
        None, gt=0, lt=1, description="SDXL refiner: where in the noise schedule the latents of the base model stand."
    )

    @field_validator("image", mode="before")
    @classmethod
    def _some_pictures(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list | tuple) else [value]


class InpaintingInputs(DiffusionInputs):
    """Inputs of inpainting. The size is the picture's own, rounded down to the autoencoder's grid."""

    image: Picture | None = Field(None, description="The picture to change; or give latents, with denoising_start.")
    mask: Picture = Field(description="What to change: white is painted anew, black stays. Of the picture's size.")
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How far to go from what is there. By default 1; 0.9999 for SDXL, 0.6 for SD 3, FLUX.1 "
        "(Kontext: 1) and Qwen-Image, 0.8 for FLUX.2.",
    )
    denoising_start: float | None = Field(
        None, gt=0, lt=1, description="SDXL refiner: where in the noise schedule the latents of the base model stand."
    )
    reference: Picture | None = Field(
        None,
        description="FLUX.1 Kontext: the picture that the model sees, in place of the one to change. FLUX.2: one that "
        "it sees besides.",
    )
    padding_mask_crop: int | None = Field(
        None,
        ge=0,
        le=16384,
        description="Paint in a part of the picture: what is around the mask, with so many pixels on each side, is cut "
        "out, made at width and height, and put back, so that small things get all of the model's detail.",
    )
    paste: bool = Field(
        False,
        description="Put the picture's own pixels back where the mask is black: the autoencoder alone changes them.",
    )
