"""The options of both extensions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge.config import InputFile

__all__ = ["CHECKPOINT_OPTIONS", "LoaderOptions", "SchedulerOptions"]


CHECKPOINT_OPTIONS = ("tokenizer", "config", "prediction_type", "ema")
"""Options that a diffusers folder has no use for: it says all that itself."""


class LoaderOptions(BaseModel):
    """How a diffusers folder or a single-file checkpoint is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["f16", "f32"] = Field("f16", description="How weights are stored.")
    height: int | None = Field(None, gt=0, description="Fix the height of pictures, in pixels; default: any.")
    width: int | None = Field(None, gt=0, description="Fix the width of pictures, in pixels; default: any.")
    batch: int | None = Field(None, gt=0, description="Fix the number of pictures at once; default: any.")
    timestep: Literal["i64", "f32"] = Field(
        "i64", description="Type of the denoisers' timestep; the tasks here take fractions of either."
    )
    variant: str | None = Field(None, description='Which weights, if a folder holds several ("fp16").')
    skip: tuple[str, ...] = Field(
        ("safety_checker", "image_encoder"), description="Components to leave out, with a warning."
    )
    tokenizer: InputFile | None = Field(
        None, description="A checkpoint's tokenizers: a folder that holds one, or a diffusers folder."
    )
    config: InputFile | None = Field(
        None, description="A diffusers folder whose configs, and not weights, a checkpoint is to have."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What a checkpoint's UNet predicts, if the file does not say it."
    )
    ema: bool = Field(False, description="Take the running averages (model_ema) of a checkpoint's UNet.")

    @model_validator(mode="after")
    def _both_sides(self) -> LoaderOptions:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        return self


class SchedulerOptions(BaseModel):
    """Which diffusers scheduler samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_name: str | None = Field(None, description="Class of diffusers; default: the one the model names.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the class, over the model's scheduler config."
    )
