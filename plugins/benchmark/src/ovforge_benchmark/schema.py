"""What is written down of a measurement: one versioned schema, in pydantic, for every report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "VERSION",
    "Benchmark",
    "Candidate",
    "Comparison",
    "Group",
    "Histogram",
    "InputFacts",
    "Machine",
    "Moment",
    "Operator",
    "Record",
    "Statistics",
    "Versus",
    "report_schema",
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
    stdev: float = Field(description="Of the sample, by count - 1; 0 if there is one.")
    median: float
    p90: float
    p95: float
    p99: float
    max: float


class Machine(Record):
    """Where it was measured. None if the system does not tell."""

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
    likeness: dict[str, list[float]] = Field(
        default_factory=dict,
        description="Metric -> how close each call's result comes to the first candidate's; psnr in decibels, 100 for "
        "equal pictures.",
    )
    outputs: list[list[str]] = Field(
        default_factory=list, description="What the terminal shows of each call's result; empty lists for pictures."
    )
    provenance: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Comparison(Record):
    """A report of `ovforge compare`."""

    schema_version: Literal[1] = 1
    kind: Literal["comparison"] = "comparison"
    created: str = Field(description="UTC, ISO 8601.")
    complete: bool = Field(True, description="False if it was interrupted: it holds what was measured by then.")
    machine: Machine
    rounds: int
    runs: int
    calls: list[dict[str, Any]] = Field(description="Inputs of each row of pictures that the command named.")
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...] = ()


class InputFacts(Record):
    """One input of a model, and what it was given."""

    name: str
    type: str
    shape: str
    layout: str = ""
    filled_with: str = Field(description='"random numbers", or the files.')


class Group(Record):
    """Shapes that were fed together, and the latency with them."""

    shapes: dict[str, tuple[int, ...]]
    latency: Statistics | None = None


class Histogram(Record):
    """How often latencies fell between two edges; edges are seconds, evenly apart, the last bin is open above."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Moment(Record):
    """A slice of the measured time: when it began (seconds), inferences that ended in it, and their median latency."""

    start: float
    count: int
    median: float | None


class Operator(Record):
    """Time of one layer, in seconds a run, over all that a role was run for; only layers that ran."""

    role: str
    name: str
    type: str
    kernel: str = Field(description="Which of the device's implementations ran, and in what type.")
    seconds: float
    cpu_seconds: float
    share: float = Field(description="Of its role's layers.")


class Benchmark(Record):
    """A report of `ovforge benchmark`. All times are seconds, all sizes bytes."""

    schema_version: Literal[1] = 1
    kind: Literal["benchmark"] = "benchmark"
    created: str = Field(description="UTC, ISO 8601.")
    complete: bool = Field(True, description="False if it was interrupted: it holds what was measured by then.")
    what: str = Field(description="The model or pipeline, as it was asked for.")
    subject: Literal["model", "pipeline"]
    machine: Machine
    asked: dict[str, Any] = Field(default_factory=dict, description="Flags and settings, as given.")
    ran: dict[str, Any] = Field(default_factory=dict, description="What the device says that it really did.")
    precision: dict[str, str] = Field(default_factory=dict, description="Role -> what it was computed in.")
    inputs: tuple[InputFacts, ...] = ()
    start: dict[str, float] = Field(default_factory=dict, description="read, reshape, compile, first...: once each.")
    iterations: int = 0
    duration: float = 0.0
    throughput: float | None = Field(None, description="Frames (inferences times batch) or calls a second.")
    latency: Statistics | None = Field(None, description="Of an inference, or of a call of the pipeline.")
    percentile: dict[str, float] = Field(default_factory=dict, description="The percentile that was asked for.")
    groups: tuple[Group, ...] = ()
    stages: dict[str, Statistics] = Field(default_factory=dict, description="Pipelines: each run of each part.")
    shares: dict[str, float] = Field(default_factory=dict, description="Pipelines: part of a call's time.")
    histogram: Histogram | None = None
    timeline: tuple[Moment, ...] = ()
    operators: tuple[Operator, ...] = ()
    peak_memory: int | None = None
    energy: float | None = Field(None, description="Joules of the processor packages while it was measured.")
    warnings: tuple[str, ...] = ()


class Versus(Record):
    """A report of `ovforge benchmark A --against B`: how many times as long A takes as B."""

    schema_version: Literal[1] = 1
    kind: Literal["versus"] = "versus"
    created: str = Field(description="UTC, ISO 8601.")
    complete: bool = True
    machine: Machine
    labels: tuple[str, str]
    precision: tuple[dict[str, str], dict[str, str]]
    seconds: tuple[Statistics, Statistics] | None = Field(description="An inference or call of each, by block.")
    pairs: int
    ratio: float = Field(description="Of A's time to B's: above 1, B is faster.")
    low: float = Field(description="Lower end of the 95 % interval.")
    high: float | None = Field(description="Upper end; None if too little was measured to tell.")
    within: float
    narrow: bool = Field(description="Whether the interval is as narrow as was asked.")
    warnings: tuple[str, ...] = ()


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema of every report; `kind` tells which one it is."""
    from ovforge_benchmark.tune import Tuning

    schema = TypeAdapter(Benchmark | Comparison | Versus | Tuning).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Reports of ovforge-benchmark",
        **schema,
    }
