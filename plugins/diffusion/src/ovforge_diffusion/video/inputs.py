"""What one call of text-to-video, image-to-video and video-to-video takes, and how they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovforge.model import Picture
from ovforge_diffusion.inputs import (
    DiffusionInputs,
    DiffusionOptions,
    GuidanceRescale,
    GuidanceStart,
    GuidanceStop,
    Latents,
)
from ovforge_diffusion.video.reading import Clip

__all__ = [
    "ImageToVideoInputs",
    "TextToVideoInputs",
    "UpsampleVideoInputs",
    "UpsampleVideoOptions",
    "Upscale",
    "VideoCondition",
    "VideoOptions",
    "VideoToVideoInputs",
]


Tile = Annotated[
    int | None,
    Field(
        ge=64,
        description="Videos larger than this many pixels a side are decoded in overlapping tiles of that size, as "
        "enable_tiling of diffusers does. By default 512 for videos of more than 20 million pixels in all frames.",
    ),
]
TileFrames = Annotated[
    int | None,
    Field(ge=16, description="Likewise for videos of more frames than this. By default 64 for the same videos."),
]
DecodeTimestep = Annotated[
    float | None,
    Field(
        ge=0,
        le=1,
        description="LTX-Video 0.9.1 and later: the part of noise that the decoder takes out at last. By default 0.",
    ),
]
DecodeNoiseScale = Annotated[
    float | None, Field(ge=0, le=1, description="The part of noise that is added before. By default decode_timestep.")
]


AdainFactor = Annotated[
    float, Field(ge=0, le=10, description="How far each channel gets the mean and deviation that it had before.")
]
ToneMapCompressionRatio = Annotated[float, Field(ge=0, le=1, description="How far large latents are made smaller.")]
ImageCondNoiseScale = Annotated[float, Field(ge=0, le=10)]
_REFINING = 10
"""Steps of which the last are gone over what is enlarged, as the makers have it."""


class VideoOptions(DiffusionOptions):
    """How the tasks run."""

    tile: Tile = None
    tile_frames: TileFrames = None


class UpsampleVideoOptions(BaseModel):
    """How upsample-video runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: Tile = None
    tile_frames: TileFrames = None
    low_memory: bool = Field(False, description="Hold one role in memory at a time.")


class TextToVideoInputs(BaseModel):
    """Inputs of text-to-video. What is left out, the model's own defaults fill."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    prompt: str | list[str] = Field(description="What the video shows; a list gives a batch.")
    negative_prompt: str | list[str] | None = Field(None, description="What it should not show.")
    num_frames: int = Field(161, ge=1, le=4096, description="Frames: one more than a multiple of 8.")
    frame_rate: float = Field(25.0, gt=0, le=240, allow_inf_nan=False, description="Frames a second.")
    width: int | None = Field(None, ge=32, le=16384, description="Pixels, a multiple of 32. By default 704.")
    height: int | None = Field(None, ge=32, le=16384, description="Pixels, a multiple of 32. By default 512.")
    steps: int | None = Field(None, ge=1, description="Denoising steps. By default 50.")
    timesteps: list[float] | None = Field(
        None, min_length=1, description="The timesteps to go over, from 1000 down, in place of steps."
    )
    sigmas: list[float] | None = Field(
        None, min_length=1, description="Likewise levels of noise, from 1 down, before any shift."
    )
    guidance_scale: float | None = Field(None, ge=0, description="How closely to follow the prompt. By default 3.")
    guidance_rescale: GuidanceRescale = 0.0
    guidance_start: GuidanceStart = 0.0
    guidance_stop: GuidanceStop = 1.0
    decode_timestep: DecodeTimestep = None
    decode_noise_scale: DecodeNoiseScale = None
    max_sequence_length: int | None = Field(
        None, ge=1, le=512, description="Tokens of the prompt that T5 reads. By default 128."
    )
    count: int = Field(1, ge=1, le=64, description="Videos for each prompt.")
    seed: int | list[int] | None = Field(
        None, description="Random seed of the first video; the next ones take the next numbers. Or one for each video."
    )
    latents: Latents | None = Field(
        None, description="The first noise, float32 (videos, channels, frames, height, width) of the latents: .npy."
    )
    decode: bool | None = Field(None, description="Whether to make videos of the latents.")

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("give at least one prompt")
        return value

    def shared(self) -> DiffusionInputs:
        """Return what it says that a call for pictures says, too."""
        names = self.model_fields_set & DiffusionInputs.model_fields.keys()
        return DiffusionInputs(**{name: getattr(self, name) for name in names})


class ImageToVideoInputs(TextToVideoInputs):
    """Inputs of image-to-video."""

    image: list[Picture] = Field(
        min_length=1, description="The first frame, which is made the video's size; a list gives one for each prompt."
    )

    @field_validator("image", mode="before")
    @classmethod
    def _some_pictures(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]


class VideoCondition(BaseModel):
    """A picture, or a video, that is seen from one of the frames on."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    image: Picture | None = Field(None, description="The picture.")
    video: Clip | None = Field(
        None, description="Or the video: a file, or a folder of pictures. It is taken as far as there is room for it."
    )
    frame_index: int = Field(
        0, ge=0, le=4095, description="The frame that it is at, counted from 0; of videos a multiple of 8."
    )
    strength: float = Field(1.0, gt=0, le=1, description="How far it is kept: 1 as it is, less changes it.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.image is None) == (self.video is None):
            raise ValueError("give image or video, and not both")
        return self


class Upscale(BaseModel):
    """How a video is made small, enlarged by the model's latent upsampler, and refined by a second run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    adain_factor: AdainFactor = 0.0
    tone_map_compression_ratio: ToneMapCompressionRatio = 0.0
    strength: float = Field(
        0.4, gt=0, lt=1, description="How far the second run goes: of 10 steps, 0.4 goes the last four."
    )
    steps: int | None = Field(None, ge=1, description=f"Its steps, of which it goes the last. By default {_REFINING}.")
    timesteps: list[float] | None = Field(None, min_length=1, description="Its timesteps, in place of steps.")
    sigmas: list[float] | None = Field(None, min_length=1, description="Likewise levels of noise.")
    guidance_scale: float | None = Field(
        None, ge=0, description="How closely it follows the prompt. By default as the first run."
    )
    image_cond_noise_scale: ImageCondNoiseScale | None = Field(
        None, description="Its noise on conditions of strength 1. By default as in the first run."
    )


class VideoToVideoInputs(TextToVideoInputs):
    """Inputs of video-to-video."""

    conditions: list[VideoCondition] | None = Field(
        None, max_length=64, description="Pictures and videos that are seen at some of the frames."
    )
    image_cond_noise_scale: ImageCondNoiseScale = Field(
        0.15, description="Noise, less from step to step, on conditions of strength 1, so that what follows moves."
    )
    video: Clip | None = Field(
        None, description="The video to change: noise is added to it, as much as strength says. Or give latents."
    )
    latents: Latents | None = Field(
        None, description="Likewise its latents, float32 (videos, channels, frames, height, width): .npy."
    )
    strength: float | None = Field(None, gt=0, lt=1, description="How far to go from video or latents. By default 0.8.")
    max_sequence_length: int | None = Field(
        None, ge=1, le=512, description="Tokens of the prompt that T5 reads. By default 256."
    )
    upscale: Upscale | None = Field(
        None, description="Make it small, or of fewer frames, enlarge it by latent_upsampler, and refine it."
    )

    @field_validator("conditions", mode="before")
    @classmethod
    def _some_conditions(cls, value: Any) -> Any:
        """One condition may stand alone, and a picture alone is the first frame."""
        if value is None:
            return None
        each = value if isinstance(value, list | tuple) else [value]
        return [item if isinstance(item, dict | VideoCondition) else {"image": item} for item in each]

    def small(self, size: tuple[int, int], every: int, seeds: Sequence[int]) -> Self:
        """Return the first call of those that `upscale` stands for.

        It makes latents of a `size` (width, height), and of each frame, or with `every` = 2 of each second one.
        """
        conditions = self.conditions and [
            each.model_copy(update={"frame_index": each.frame_index // every}) for each in self.conditions
        ]
        change: dict[str, Any] = {"upscale": None, "width": size[0], "height": size[1], "seed": list(seeds)}
        change |= {"num_frames": (self.num_frames - 1) // every + 1, "frame_rate": self.frame_rate / every}
        change |= {"conditions": conditions, "decode": False, "decode_timestep": None, "decode_noise_scale": None}
        return self.model_copy(update=change)

    def refining(self, size: tuple[int, int], seeds: Sequence[int], latents: NDArray[np.float32]) -> Self:
        """Return the last one: a run over the rest of the steps, from `latents` of the whole size."""
        assert self.upscale is not None
        change = self.upscale.model_dump(include={"strength", "steps", "timesteps", "sigmas"})
        if change["timesteps"] is None and change["sigmas"] is None:
            change["steps"] = change["steps"] or _REFINING
        for name in ("guidance_scale", "image_cond_noise_scale"):
            if (value := getattr(self.upscale, name)) is not None:
                change[name] = value
        if change.get("guidance_scale", 2.0) <= 1:  # what is for guidance is for the first run
            change |= {"negative_prompt": None, "guidance_rescale": 0.0, "guidance_start": 0.0, "guidance_stop": 1.0}
        change |= {"width": size[0], "height": size[1], "seed": list(seeds)}
        return self.model_copy(update={**change, "upscale": None, "video": None, "latents": latents})


class UpsampleVideoInputs(BaseModel):
    """Inputs of upsample-video."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    video: Clip | None = Field(None, description="The video to enlarge: a file, or a folder of pictures.")
    latents: Latents | None = Field(
        None, description="Or its latents, float32 (videos, channels, frames, height, width): .npy."
    )
    width: int | None = Field(
        None, ge=32, le=16384, description="Pixels that the video gets before; by default its own, rounded down to 32s."
    )
    height: int | None = Field(None, ge=32, le=16384, description="Likewise.")
    frame_rate: float | None = Field(
        None,
        gt=0,
        le=240,
        allow_inf_nan=False,
        description="Frames a second of the file made. By default the video's (twice that of more frames), or 25.",
    )
    adain_factor: AdainFactor = 0.0
    tone_map_compression_ratio: ToneMapCompressionRatio = 0.0
    decode_timestep: DecodeTimestep = None
    decode_noise_scale: DecodeNoiseScale = None
    seed: int | list[int] | None = Field(
        None, description="Random seed of the first video; the next ones take the next numbers. Or one for each."
    )
    decode: bool = Field(True, description="Whether to make videos of the latents.")
