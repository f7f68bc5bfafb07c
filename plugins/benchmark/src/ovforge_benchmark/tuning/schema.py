"""What is written down of a tuning."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ovforge_benchmark.schema import Machine, Record

__all__ = ["Aim", "Trial", "TuningReport"]

Aim = Literal["latency", "throughput", "memory"]


class Trial(Record):
    """A pipeline that was tried: how long it took, how close its results came to the original's, its memory."""

    label: str
    changes: tuple[dict[str, Any], ...] = ()
    calls: int
    seconds: float = Field(0.0, description="Of a call: the median one's, or with aim throughput the mean.")
    stages: dict[str, float] = Field(default_factory=dict, description="Median seconds of each part of a call.")
    memory: int | None = Field(None, description="Peak resident bytes of its process.")
    scores: tuple[float, ...] = ()
    roles: tuple[str, ...] = Field((), description="Models that quantizers changed.")
    error: str = Field("", description="Why it could not run.")
    warnings: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(self.scores) / len(self.scores) if self.scores else float("-inf")

    def cost(self, aim: Aim) -> float:
        """Return what is to be small: seconds, or bytes."""
        if self.error:
            return float("inf")
        return float(self.memory or float("inf")) if aim == "memory" else self.seconds


class TuningReport(Record):
    """A report of `ovforge tune`."""

    schema_version: Literal[1] = 1
    kind: Literal["pipeline tuning"] = "pipeline tuning"
    created: str
    complete: bool = Field(description="Whether there was time for all that promised something.")
    what: str
    aim: Aim
    metric: str
    min_score: float
    samples: int
    machine: Machine
    trials: tuple[Trial, ...]
    winner: str | None = Field(description="Label of the trial whose config was written; None if none is better.")
    duel: tuple[Trial, ...] = Field(
        (), description="The original and the winner, measured anew in turn, the least of each."
    )
    left_out: tuple[str, ...] = Field((), description="What there was no time for, by label.")
    warnings: tuple[str, ...] = ()
