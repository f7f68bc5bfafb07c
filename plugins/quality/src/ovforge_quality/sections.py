"""The sections of a config that this plugin reads: [calibration] and [quality]."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["CalibrationSection", "QualitySection"]


class _Data(BaseModel):
    """Inputs to run a pipeline with: by default the task's own examples."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    file: str | None = Field(
        None,
        description="A text file with the task's first input on each line, a .jsonl of inputs, or, if the first "
        "input is a picture, a folder of pictures; without a task, a .npz of the model's inputs, or a folder of such "
        "files. Relative to the config.",
    )
    inputs: tuple[dict[str, Any], ...] = Field((), description="Inputs themselves, a table for each call.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="What all calls have in common: steps, guidance_scale..."
    )
    seed: int = Field(0, ge=0, le=2**31, description="Other seeds give other random numbers and another choice.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.inputs:
            raise ValueError("give file or inputs, not both")
        return self


class CalibrationSection(_Data):
    """What quantizers see: inputs of models, recorded while the pipeline runs."""

    samples: int = Field(300, ge=1, le=100_000, description="Records of each role that are kept, drawn evenly.")
    runs: int | None = Field(
        None,
        ge=1,
        description="Calls of the pipeline; by default as many as give that many records of the model that runs most "
        "often, and at least 8.",
    )
    spill: bool = Field(False, description="Keep records on disk, not in memory, while they are made.")


class QualitySection(_Data):
    """The gate: how close the quantized pipeline must come to the unquantized one."""

    metric: Literal["ssim", "psnr", "gmsd", "task"] | None = Field(
        None, description="By default ssim where results are pictures, else the task's own."
    )
    min_score: float | None = Field(None, description="The score to reach; psnr is in dB.")
    max_drop: float | None = Field(None, ge=0, description="How far below the score of equal results, 1, it may lie.")
    by: Literal["mean", "worst"] = Field("mean", description="Whose score counts: the mean's, or the worst result's.")
    samples: int = Field(8, ge=1, le=10_000, description="Calls to compare, none of which calibration has seen.")
    on_fail: Literal["error", "warn", "search"] = Field(
        "error", description="search: find the layers that must stay in higher precision."
    )
    save: str = Field("quality", description="Folder for the worst pictures side by side. Relative to the config.")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.min_score is None) == (self.max_drop is None):
            raise ValueError("give min_score or max_drop, one of them")
        if self.metric == "psnr" and self.max_drop is not None:
            raise ValueError("max_drop is not a limit for psnr, which is unbounded: give min_score in dB")
        perfect = 100 if self.metric == "psnr" else 1
        if self.min_score is not None and self.min_score > perfect:
            raise ValueError(f"min_score = {self.min_score:g} is more than equal results have, {perfect}")
        return self

    @property
    def limit(self) -> float:
        """The score to reach."""
        return self.min_score if self.min_score is not None else 1 - (self.max_drop or 0.0)
