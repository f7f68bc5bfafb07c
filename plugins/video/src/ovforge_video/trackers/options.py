"""Options of the trackers, light to import: what a config may say of each."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ByteTrackOptions",
    "OcSortOptions",
    "ShortTermOptions",
    "SortOptions",
    "SteadyOptions",
    "ZeroTermColourOptions",
    "ZeroTermOptions",
]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    per_class: bool = Field(False, description="Whether a thing keeps its class, so that no box of another is its own.")


class SortOptions(_Options):
    """Options of `sort`, with the paper's defaults."""

    overlap: float = Field(0.3, gt=0, le=1, description="Least overlap (IoU) between a box and a prediction.")
    keep: int = Field(1, ge=1, description="Pictures that a thing may be unseen.")
    hits: int = Field(3, ge=1, description="Pictures in a row in which a thing is seen before it counts.")


class OcSortOptions(SortOptions):
    """Options of `oc-sort`, with the paper's defaults."""

    keep: int = Field(30, ge=1, description="Pictures that a thing may be unseen.")
    momentum: float = Field(0.2, ge=0, le=10, description="What the direction of motion counts beside the overlap.")
    span: int = Field(3, ge=1, le=100, description="Boxes back to the one that the direction is taken from.")


class ByteTrackOptions(_Options):
    """Options of `byte-track`, with the paper's defaults; `high` is by default the model's threshold."""

    high: float | None = Field(None, ge=0, le=1, description="Score of sure boxes; by default the model's threshold.")
    low: float = Field(0.1, ge=0, le=1, description="Score of boxes that may only prolong a track.")
    rise: float = Field(0.1, ge=0, le=1, description="What a new thing's first box scores above `high`.")
    overlap: float = Field(0.2, gt=0, le=1, description="Overlap (IoU times score) of a sure box and a prediction.")
    weak_overlap: float = Field(0.5, gt=0, le=1, description="Overlap (IoU) of a weak box and a prediction.")
    first_overlap: float = Field(0.3, gt=0, le=1, description="Overlap of a thing's second box with its first.")
    keep: int = Field(30, ge=1, description="Pictures that a thing may be unseen.")


class ZeroTermOptions(_Options):
    """Options of `zero-term-imageless`."""

    overlap: float = Field(0.2, gt=0, le=1, description="Least overlap (IoU) between two boxes of one thing.")
    keep: int = Field(10, ge=1, description="Pictures that a thing may be unseen.")


class ZeroTermColourOptions(ZeroTermOptions):
    """Options of `zero-term`."""

    likeness: float = Field(0.7, ge=0, le=1, description="Likeness of colours (Bhattacharyya) of a thing's boxes.")


class ShortTermOptions(_Options):
    """Options of `short-term-imageless`."""

    low: float = Field(0.1, ge=0, le=1, description="Score of boxes that may only prolong a track.")
    rise: float = Field(
        0.1, ge=0, le=1, description="What a new thing's first box scores above the threshold, up to a half."
    )
    overlap: float = Field(0.2, gt=0, le=1, description="Least overlap (IoU) between a box and a prediction.")
    direction: float = Field(0.3, ge=0, le=10, description="What the direction of motion counts beside the overlap.")
    weak_overlap: float = Field(0.3, gt=0, le=1, description="Overlap (IoU) of a weak box and a prediction.")
    part: float = Field(0.6, gt=0, le=1, description="A box that lies in a thing's by this share begins nothing.")
    hits: int = Field(3, ge=1, description="Times that a thing is found before it counts.")
    keep: float = Field(1.0, gt=0, description="Seconds that a thing may be unseen.")


class SteadyOptions(ShortTermOptions):
    """Options of `steady`."""

    likeness: float = Field(0.65, ge=0, le=1, description="Likeness of colours (Bhattacharyya) of a box and its thing.")
    return_likeness: float = Field(0.8, ge=0, le=1, description="The same if it was away, and comes back farther off.")
