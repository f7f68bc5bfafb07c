"""PipelineConfig: what a pipeline is, from TOML, JSON, a dict or Python.

Options of extensions are kept as written until the extension that takes them is known; `validate_options` then
checks them with its own pydantic model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovforge.config.files import apply_overrides, read_config
from ovforge.config.options import checked
from ovforge.errors import ConfigError, did_you_mean, require_type

__all__ = ["PipelineConfig", "Use"]


class Use(BaseModel):
    """An extension by name, with its options: `Use("lora", path="x.safetensors", scale=0.75)`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: str

    def __init__(self, use: str | None = None, /, **options: Any) -> None:
        require_type(use, (str, NoneType), where="Use", hint='Write: Use("NAME", option=value).')
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
    use: str | None = Field(None, description="The loader; by default, the one that knows the content.")
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


class PipelineConfig(BaseModel):
    """A whole pipeline. `input` holds what a call takes if the call itself does not say.

    Other top-level tables are sections that belong to the plugin which drives quantizers, such as [calibration].
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    task: Use | None = Field(None, description="What the pipeline is for.")
    load: Load = Field(description="The model: where it comes from, and how it is read.")
    transform: tuple[Use, ...] = Field((), description="Changes to the models; phases first, then this order.")
    quantize: tuple[Use, ...] = Field((), description="Lower precision for named roles.")
    scheduler: Use | None = Field(None, description="The sampling method; by default the model's own.")
    device: Use = Field(default_factory=lambda: Use("cpu"), description="Where to run.")
    input: dict[str, Any] = Field(default_factory=dict, description="The task's inputs: prompt, steps, seed...")
    optimize: bool = Field(True, description="Make the exact changes to models that the task brings to run faster.")
    strict: bool = Field(True, description="Refuse to go on if something that was asked for cannot be applied.")
    output: str | None = Field(None, description="Where `ovforge run` writes its result.")

    @property
    def sections(self) -> dict[str, Any]:
        """The tables that belong to the driver of quantizers, as written."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}

    @field_validator("device", mode="before")
    @classmethod
    def _device(cls, value: Any) -> Any:
        """Options alone are the CPU's, and OpenVINO's "GPU" is `gpu`."""
        if isinstance(value, Mapping):
            value = {"use": "cpu", **value}
            return {**value, "use": value["use"].lower()} if isinstance(value["use"], str) else value
        if isinstance(value, Use):
            return value.model_copy(update={"use": value.use.lower()})
        return value.lower() if isinstance(value, str) else value

    @classmethod
    def of(cls, value: Any, *, where: str = "config") -> PipelineConfig:
        """Check a dict, or return a config as it is. Raises ConfigError that names the key."""
        if isinstance(value, PipelineConfig):
            return value
        config = checked(cls, value, where=where)
        for name, section in config.sections.items():
            if not isinstance(section, Mapping):
                raise ConfigError(
                    f"unknown key `{name}`.{did_you_mean(name, cls.model_fields)}",
                    where=where,
                    hint=f"Known keys: {', '.join(cls.model_fields)}.",
                )
        return config

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
        """Return the checked config of a .toml or .json file, with overrides "key.path=value". Raises ConfigError."""
        return cls.of(apply_overrides(read_config(path), overrides), where=str(path))

    def as_dict(self) -> dict[str, Any]:
        """Return the config as it would be written: no defaults, names instead of tables without options."""
        written = self.model_dump(mode="json", exclude_defaults=True)
        for key in ("task", "scheduler", "device"):
            if set(written.get(key) or {}) == {"use"}:
                written[key] = written[key]["use"]
        if set(written["load"]) == {"source"}:
            written["load"] = written["load"]["source"]
        return written
