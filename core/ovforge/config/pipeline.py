"""PipelineConfig: what a pipeline is, from TOML, JSON, a dict or Python.

Options of extensions are kept as written until the extension that takes them is known; `validate_options` then
checks them with its own pydantic model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovforge.config.options import checked
from ovforge.errors import ConfigError

__all__ = ["CalibrationTable", "PipelineConfig", "QualityTable", "Use"]


class Use(BaseModel):
    """An extension by name, with its options: `Use("lora", path="x.safetensors", scale=0.75)`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str

    def __init__(self, use: str | None = None, /, **options: Any) -> None:
        super().__init__(**({"use": use} if use is not None else {}), **options)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """`scheduler = "lcm"` says the same as `scheduler = {use = "lcm"}`."""
        return {"use": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The options as written."""
        return dict(self.model_extra or {})


class Load(BaseModel):
    """Where the model comes from. Without `use`, the loader is found by the content of `source`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    source: str = Field(description="A folder or file, or package:NAME/PATH inside an installed Python package.")
    use: str | None = Field(None, description="The loader; found by content where it is not given.")
    parts: dict[str, str] = Field(
        default_factory=dict, description="Roles that come from elsewhere: role -> source, as vae_decoder = FOLDER."
    )
    key: dict[str, Any] | None = Field(
        None,
        exclude=True,
        repr=False,
        description='Where the key of an encrypted source is: {env = "NAME"}, {file = "PATH"}... Never the key itself.',
    )

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not isinstance(value.get("key"), Mapping | None):
            # Raised here, since other errors show what was given.
            raise ConfigError("says where the key is, as a table", where="load.key", hint='Write: key = {env = "NAME"}')
        if isinstance(value, str | Path):
            return {"source": str(value)}
        if isinstance(value, Mapping) and isinstance(value.get("source"), Path):
            return {**value, "source": str(value["source"])}
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The loader's options as written."""
        return dict(self.model_extra or {})


class _Data(BaseModel):
    """Inputs to run a pipeline with: by default the task's own examples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str | None = Field(
        None,
        description="A text file with the task's first input on each line, a .jsonl of inputs, or, where the first "
        "input is a picture, a folder of pictures. Relative to the config.",
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


class CalibrationTable(_Data):
    """What quantizers see: inputs of models, recorded while the pipeline runs."""

    samples: int = Field(300, ge=1, le=100_000, description="Records of each role that are kept, drawn evenly.")
    runs: int | None = Field(
        None,
        ge=1,
        description="Calls of the pipeline; by default as many as give that many records of the model that runs most "
        "often, and at least 8.",
    )
    spill: bool = Field(False, description="Keep records on disk, not in memory, while they are made.")


class QualityTable(_Data):
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
            raise ValueError("max_drop is no limit for psnr, which is unbounded: give min_score in dB")
        perfect = 100 if self.metric == "psnr" else 1
        if self.min_score is not None and self.min_score > perfect:
            raise ValueError(f"min_score = {self.min_score:g} is more than equal results have, {perfect}")
        return self

    @property
    def limit(self) -> float:
        """The score to reach."""
        return self.min_score if self.min_score is not None else 1 - (self.max_drop or 0.0)


class PipelineConfig(BaseModel):
    """A whole pipeline. `input` holds what a call takes where the call itself does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Use = Field(description="What the pipeline is for.")
    load: Load
    transform: tuple[Use, ...] = Field((), description="Changes to the models; phases first, then this order.")
    quantize: tuple[Use, ...] = Field((), description="Lower precision for named roles.")
    calibration: CalibrationTable | None = Field(None, description="What quantizers see.")
    quality: QualityTable | None = Field(None, description="How close the quantized pipeline must come to the other.")
    scheduler: Use | None = Field(None, description="The sampling method; by default the model's own.")
    device: Use = Field(default_factory=lambda: Use("cpu"), description="Where to run.")
    input: dict[str, Any] = Field(default_factory=dict, description="The task's inputs: prompt, steps, seed...")
    optimize: bool = Field(True, description="Make the exact changes to models that the task brings to run faster.")
    strict: bool = Field(True, description="Refuse to go on where something asked for could not be applied.")
    output: str | None = Field(None, description="Where `ovforge run` writes its result.")

    @field_validator("device", mode="before")
    @classmethod
    def _the_cpu(cls, value: Any) -> Any:
        """Options alone are the CPU's."""
        return {"use": "cpu", **value} if isinstance(value, Mapping) else value

    @classmethod
    def of(cls, value: Any, *, where: str = "config") -> PipelineConfig:
        """Check a dict, or return a config as it is. Raises ConfigError that names the key."""
        if isinstance(value, PipelineConfig):
            return value
        return checked(cls, value, where=where)

    def as_dict(self) -> dict[str, Any]:
        """Return the config as it would be written: no defaults, names instead of tables without options."""
        written = self.model_dump(mode="json", exclude_defaults=True)
        for key in ("task", "scheduler", "device"):
            if set(written.get(key) or {}) == {"use"}:
                written[key] = written[key]["use"]
        if set(written["load"]) == {"source"}:
            written["load"] = written["load"]["source"]
        return written
