"""The options of the loader."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import InputFile

__all__ = ["LoaderOptions"]


class LoaderOptions(BaseModel):
    """How a GroundingDINO is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["f16", "f32"] = Field("f16", description="How weights are stored.")
    config: InputFile | None = Field(
        None,
        description="The original repository's config of a checkpoint (.py, which is read and not run, or .json); "
        "by default that of Swin-T or Swin-B, by the weights.",
    )
    tokenizer: InputFile | None = Field(
        None, description="A checkpoint's tokenizer: the folder of bert-base-uncased, or its vocab.txt."
    )
