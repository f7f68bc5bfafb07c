"""Video analytics: decode, detect, track, overlay, encode. Listing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, TaskExtension, TrackerExtension

__all__ = ["ovforge_commands", "ovforge_tasks", "ovforge_trackers"]

_TRACKERS = (
    ("steady", "Place, motion and colours; bridges pictures between detections", "steady:Steady", "Steady", False),
    ("zero-term", "DL Streamer's: place and colours, each picture", "zero_term:ZeroTerm", "ZeroTermColour", True),
    ("zero-term-imageless", "DL Streamer's: place, each picture", "zero_term:ZeroTermImageless", "ZeroTerm", True),
    (
        "short-term-imageless",
        "DL Streamer's: place and motion between detections",
        "steady:ShortTerm",
        "ShortTerm",
        False,
    ),
    ("sort", "SORT: place and motion", "sort:Sort", "Sort", True),
    ("oc-sort", "OC-SORT: last boxes and directions, after SORT", "oc_sort:OcSort", "OcSort", True),
    ("byte-track", "ByteTrack: sure boxes, then weak ones", "byte_track:ByteTrack", "ByteTrack", False),
)
"""Name, summary, class, options, and whether it needs what is found in each picture."""


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Yield the task."""
    yield TaskExtension(
        name="video",
        summary="Find and follow things in videos and streams",
        config="ovforge_video.options:VideoOptions",
        inputs="ovforge_video.options:VideoInputs",
        result="ovforge_video.result:VideoResult",
        factory="ovforge_video.task:Video",
        roles=("detector",),
        optional_roles=("text_encoder", "tokenizer"),
    )


@hookimpl
def ovforge_trackers() -> Iterator[TrackerExtension]:
    """Yield the trackers, the default first."""
    for name, summary, factory, options, every in _TRACKERS:
        yield TrackerExtension(
            name=name,
            summary=summary,
            config=f"ovforge_video.trackers.options:{options}Options",
            factory=f"ovforge_video.trackers.{factory}",
            every_picture=every,
        )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield the pipeline in one command."""
    yield CommandExtension(
        name="video",
        summary="Find and follow things in videos and streams, and draw, count and encode them",
        factory="ovforge_video.command:video",
    )
