"""The options of the transform."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovforge.config import InputFile

__all__ = ["LoraOptions"]

_LARGEST = 100.0


class LoraOptions(BaseModel):
    """Which adapter, how strongly, where, and how it is applied."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: InputFile = Field(description="The adapter: a .safetensors file, or a folder of PEFT or diffusers.")
    scale: float = Field(1.0, ge=-_LARGEST, le=_LARGEST, description="Strength; 0 is none, 1 is as trained.")
    adapter: str | None = Field(
        None, description="Which one, if PEFT has put several, each with a name, into one file."
    )
    name: str | None = Field(None, pattern=r"^[\w.+-]+$", description="Its name at run time; the file's by default.")
    roles: tuple[str, ...] | None = Field(None, description="Only these models; by default all that the file is for.")
    role_scales: dict[str, float] = Field(
        default_factory=dict, description="A factor for each role: {text_encoder = 0.5}."
    )
    block_scales: dict[str, float] = Field(
        default_factory=dict,
        description='A factor for each block; the longest name that fits counts: {"up_blocks" = 0, "up_blocks.1" = 1}.',
    )
    mode: Literal["auto", "fuse", "runtime"] = Field(
        "auto",
        description="fuse: into the weights. runtime: beside them, to be switched while running. "
        "auto: fuse, and runtime if weights are compressed.",
    )
    compressed: Literal["float16", "requantize"] = Field(
        "float16",
        description="What fused weights become that were compressed. requantize: compressed again, in the same type "
        "and groups; then auto fuses them, too.",
    )
    places: Literal["own", "all"] = Field(
        "own", description="In runtime mode: where adapters may act later. all: wherever one can; it costs time a step."
    )

    @field_validator("role_scales", "block_scales")
    @classmethod
    def _bounded(cls, scales: dict[str, float]) -> dict[str, float]:
        for name, scale in scales.items():
            if not abs(scale) <= _LARGEST:
                raise ValueError(f"{name}: {scale} is not between -{_LARGEST:g} and {_LARGEST:g}")
        return scales

    @model_validator(mode="after")
    def _fuses(self) -> LoraOptions:
        if self.compressed == "requantize" and self.mode == "runtime":
            raise ValueError('compressed = "requantize" is for fused weights, and mode is "runtime"')
        return self

    @property
    def label(self) -> str:
        """The adapter's name."""
        return self.name or (f"{self.path.stem}-{self.adapter}" if self.adapter else self.path.stem)
