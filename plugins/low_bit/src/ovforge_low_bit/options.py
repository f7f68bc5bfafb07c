"""What each method can be told."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "AutoRoundOptions",
    "HalfRangeOptions",
    "IntegerOptions",
    "LorcOptions",
    "PowerQuantOptions",
    "RolesOptions",
    "ScopeOptions",
    "SoftmaxBiasOptions",
    "WandaOptions",
]

Kind = Literal["MatMul", "Convolution"]


class RolesOptions(BaseModel):
    """Which models, and which of their operations are left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[str, ...] = Field((), description="Models to change; by default all but tokenizers.")
    ignored: tuple[str, ...] = Field((), description="Names of operations to leave as they are.")
    ignored_patterns: tuple[str, ...] = Field(
        (), description="Regular expressions; an operation whose whole name fits one is left as it is."
    )

    @field_validator("ignored_patterns")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class ScopeOptions(RolesOptions):
    """And which kinds of operations have their weights changed."""

    types: tuple[Kind, ...] = Field(
        ("MatMul", "Convolution"), min_length=1, description="Operations whose weights are changed."
    )


class _Grouped(ScopeOptions):
    group_size: int = Field(
        64,
        ge=-1,
        description="Weights of a row that share a scale, -1: all of them. Where it does not divide a row, the greatest"
        " common divisor is taken, and the whole row if that is below 8.",
    )

    @field_validator("group_size")
    @classmethod
    def _group(cls, size: int) -> int:
        if size == 0:
            raise ValueError("group_size is -1, or 1 and more")
        return size


class IntegerOptions(_Grouped):
    """Integers with a scale, and a zero point if they are not symmetric."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits of a weight.")
    symmetric: bool = Field(False, description="No zero points: the largest weight of a group sets its scale.")
    packed: bool = Field(
        False,
        description="3 bits: pack them (u3). The file is smaller, and the CPU expands them to float32 when it compiles;"
        " otherwise they lie in 4 bits, in memory too.",
    )

    @model_validator(mode="after")
    def _packed_bits(self) -> IntegerOptions:
        if self.packed and self.bits != 3:
            raise ValueError(f"packed is for 3 bits, and bits is {self.bits}: others are always packed")
        return self


class _Calibrated(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(8, ge=1, le=4096, description="Recorded input sets of each role that are used.")
    rows: int = Field(
        1024,
        ge=0,
        description="Rows (tokens, or places of a convolution) of a layer's input that are used of a set, drawn with a"
        " fixed seed; 0: all.",
    )
    memory: int = Field(1024, ge=1, description="Memory for statistics of inputs that are held at a time, MiB.")


class _Learned(_Calibrated):
    max_width: int = Field(
        5120,
        ge=1,
        description="Layers of more inputs (of a convolution: channels times places) are rounded to the nearest, since"
        " learning takes outputs x inputs^2 a step.",
    )


class AutoRoundOptions(IntegerOptions, _Learned):
    """Rounding to the nearest, or by signed gradient descent."""

    iterations: int = Field(200, ge=0, le=10000, description="Steps of descent; 0: round to the nearest, without data.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="First step, which falls to 0 in a line; default: 1 / iterations, the paper's."
    )
    tune_range: bool = Field(True, description="Also shrink the range of each group by descent (the paper's α and β).")

    @property
    def learns(self) -> bool:
        """Whether recorded inputs are needed."""
        return self.iterations > 0


class LorcOptions(IntegerOptions):
    """Low-rank compensation."""

    rank: int = Field(8, ge=1, le=4096, description="Rank of the branch; less if a matrix is smaller.")
    factors: Literal["f16", "i8"] = Field("i8", description="Type of the branch's two matrices.")


class PowerQuantOptions(_Grouped, _Learned):
    """A codebook of powers."""

    bits: Literal[3, 4] = Field(4, description="Bits of a weight; 3 are stored in 4.")
    exponent: float | None = Field(None, gt=0, le=1, description="The exponent; default: searched for.")
    search: Literal["model", "layer"] = Field(
        "model", description="One exponent for a whole model (PowerQuant), or for each layer (NUPES)."
    )
    iterations: int = Field(
        0, ge=0, le=10000, description="Steps of learned rounding on top of it, with data; 0: round to the nearest."
    )

    @property
    def learns(self) -> bool:
        """Whether recorded inputs are needed."""
        return self.search == "layer" or self.iterations > 0

    @model_validator(mode="after")
    def _searched(self) -> PowerQuantOptions:
        if self.exponent is not None and self.search == "layer":
            raise ValueError('an exponent is given, so that there is nothing to search: leave out search = "layer"')
        return self


class SoftmaxBiasOptions(RolesOptions):
    """Softmax bias correction."""

    samples: int = Field(8, ge=1, le=4096, description="Recorded input sets of each role that the bias is measured on.")
    granularity: Literal["tensor", "head"] = Field(
        "head", description="One bias for each softmax, or for each of its heads (axis 1 of four)."
    )


class HalfRangeOptions(RolesOptions):
    """What float16 holds."""

    samples: int = Field(8, ge=1, le=4096, description="Recorded input sets of each role that are looked at.")
    headroom: float = Field(
        8.0,
        ge=1,
        le=4096,
        description="How many times larger values may become than those seen, before they leave the range.",
    )


class WandaOptions(ScopeOptions, _Calibrated):
    """Pruning by weights and activations."""

    pattern: Literal["unstructured", "2:4"] = Field(
        "unstructured", description="A share of each row, or two of each four neighbours."
    )
    share: float | None = Field(
        None, gt=0, lt=1, description="unstructured: part of each row that becomes 0; default: 0.5."
    )

    @model_validator(mode="after")
    def _share(self) -> WandaOptions:
        if self.share is not None and self.pattern == "2:4":
            raise ValueError("share is for unstructured pruning: 2:4 zeroes the half")
        return self
