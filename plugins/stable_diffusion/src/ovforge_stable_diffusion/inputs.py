"""What one call of text-to-image takes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["TextToImageInputs", "TextToImageOptions"]

Seed = int


class TextToImageOptions(BaseModel):
    """How the task runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    static: bool = Field(
        True,
        description="Compile for the size that [input] names, or the model's own, which runs faster. A call of another "
        "size then compiles once more, for any size.",
    )


class TextToImageInputs(BaseModel):
    """Inputs of text-to-image. What is left out, the model's own defaults fill."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | list[str] = Field(description="What the picture shows; a list gives a batch.")
    negative_prompt: str | list[str] | None = Field(None, description="What it should not show.")
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, description="How closely to follow the prompt.")
    width: int | None = Field(None, ge=8, le=8192, description="Pixels.")
    height: int | None = Field(None, ge=8, le=8192, description="Pixels.")
    count: int = Field(1, ge=1, le=256, description="Pictures for each prompt.")
    seed: Seed | list[Seed] | None = Field(
        None,
        description="Random seed of the first picture; the next ones take the next numbers. Or one for each picture.",
    )

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("give at least one prompt")
        return value
