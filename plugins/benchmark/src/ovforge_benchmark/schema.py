"""What is written down of a measurement: one versioned schema, in pydantic, for every report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "VERSION",
    "Candidate",
    "Comparison",
    "Machine",
    "Record",
    "Statistics",
]

VERSION = 1
"""Of the schema: a report that needs a field which older readers do not know has a higher one."""


class Record(BaseModel):
    """A part of a report; unknown keys are refused, so that a report of another version is not misread."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Statistics(Record):
    """Of all samples, none left out. Seconds. Percentiles are nearest-rank, as benchmark_app's."""

    count: int
    min: float
    mean: float
    stdev: float = Field(description="Of the sample, by count - 1; 0 where there is one.")
    median: float
    p90: float
    p95: float
    p99: float
    max: float


class Machine(Record):
    """Where it was measured. None where the system does not tell."""

    cpu: str
    cores: int = Field(description="Logical processors that this process may use.")
    physical_cores: int | None = None
    instruction_sets: tuple[str, ...] = Field((), description="Those that change how fast a model runs.")
    memory: int | None = Field(None, description="Bytes.")
    governor: str | None = None
    system: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Candidate(Record):
    """One column of a comparison. All times are seconds, all sizes bytes."""

    label: str
    what: str = Field(description="As it was asked for.")
    kind: Literal["pipeline", "diffusers", "picture"]
    precision: dict[str, str] = Field(default_factory=dict, description="Role -> what the device really computed in.")
    sizes: dict[str, int] = Field(default_factory=dict, description="Role -> bytes of its model on disk.")
    peak_memory: list[int] = Field(default_factory=list, description="Peak resident memory of each process.")
    stages: dict[str, list[float]] = Field(default_factory=dict, description="Stage -> its sum in each call.")
    statistics: dict[str, Statistics] = Field(default_factory=dict)
    ssim: list[float] | None = Field(None, description="Likeness of each picture to the first candidate's.")
    psnr: list[float] | None = Field(None, description="Decibels, 100 for equal pictures.")
    provenance: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Comparison(Record):
    """A report of `ovforge compare`."""

    schema_version: Literal[1] = 1
    kind: Literal["comparison"] = "comparison"
    created: str = Field(description="UTC, ISO 8601.")
    complete: bool = Field(True, description="False where it was interrupted: it holds what was measured by then.")
    machine: Machine
    rounds: int
    runs: int
    calls: list[dict[str, Any]] = Field(description="Inputs of each row of pictures that the command named.")
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...] = ()
