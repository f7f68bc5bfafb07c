"""The options of the transform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ovforge.config import InputFile

__all__ = ["TextualInversionOptions"]

Role = Literal["text_encoder", "text_encoder_2"]


def _listed(value: Any) -> Any:
    """One may stand for a list of one."""
    return [value] if isinstance(value, str | Path) else value


class TextualInversionOptions(BaseModel):
    """Which files, what their words are called, and where they go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[tuple[InputFile, ...], BeforeValidator(_listed)] = Field(
        min_length=1, description="A file, a folder of files, or a list; package:NAME/PATH lies in a Python package."
    )
    token: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        None, description="The word for each file; several for one file name its vectors, one each."
    )
    roles: Annotated[tuple[Role, ...] | None, BeforeValidator(_listed)] = Field(
        None, min_length=1, description="Text encoders that learn the words; by default all that the model has."
    )

    @model_validator(mode="after")
    def _one_token_each(self) -> TextualInversionOptions:
        if self.token is not None and len(self.path) > 1 and len(self.token) != len(self.path):
            raise ValueError(f"{len(self.token)} tokens for {len(self.path)} files: give one for each")
        return self
