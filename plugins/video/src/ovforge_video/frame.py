"""What is known of one frame of a stream: its things, where they are, and which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import PluginError

__all__ = ["Frame", "labels_of"]


def labels_of(classes: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Return the names of classes (n,), positions in `names`."""
    return [names[n] if 0 <= n < len(names) else f"class {n}" for n in classes.tolist()]


@dataclass(frozen=True)
class Frame:
    """A frame of `stream`, the `number`-th from 0 on, shown `seconds` after the stream began.

    `boxes` are float32 (n, 4): left, top, right, bottom in pixels; `scores` float32 (n,); `classes` int64 (n,),
    positions in `names`; `ids` int64 (n,), the numbers of tracks, 0 without a tracker; `found` bool (n,), whether the
    detector saw the thing in this frame, and not the tracker alone.
    """

    stream: str
    number: int
    seconds: float
    size: tuple[int, int]
    """Width, height."""
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    ids: NDArray[np.int64]
    found: NDArray[np.bool_]
    names: Sequence[str]
    session: int = 0
    """How often the stream was opened again before: tracks are others then."""
    details: Sequence[Mapping[str, Mapping[str, Any]]] = ()
    """What describing models say of each thing, by attribute: `label` and `score`, `value` or `data`."""
    picture: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    """RGB (height, width, 3)."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[str]:
        """The name of each thing's class."""
        return labels_of(self.classes, self.names)

    @property
    def words(self) -> list[dict[str, str]]:
        """Return the details that are words or numbers, by attribute, of each thing."""
        details: Sequence[Mapping[str, Mapping[str, Any]]] = self.details or [{}] * len(self)
        return [{name: each["label"] for name, each in thing.items() if each.get("label")} for thing in details]

    def to_supervision(self) -> Any:
        """Return the things as supervision's Detections: `tracker_id`, and `class_name` and `details` in their data."""
        try:
            import supervision
        except ImportError as error:
            raise PluginError(f"needs supervision: {error}", hint="Run: pip install supervision") from error
        details = {"details": np.array(self.details, dtype=object)} if self.details else {}
        return supervision.Detections(
            xyxy=self.boxes.copy(), confidence=self.scores.copy(), class_id=self.classes.copy(),
            tracker_id=self.ids.copy(), data={"class_name": np.array(self.labels, dtype=str), **details},
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return it without the picture, numbers rounded: pixels to 1/100, scores to 1/10,000."""
        objects = []
        for n, label in enumerate(self.labels):
            thing: dict[str, Any] = {
                "id": int(self.ids[n]), "label": label, "score": round(float(self.scores[n]), 4),
                "box": [round(float(value), 2) for value in self.boxes[n]], "found": bool(self.found[n]),
                **({"details": self.details[n]} if self.details else {}),
            }  # fmt: skip
            objects.append(thing)
        again = {"session": self.session} if self.session else {}
        return {
            "stream": self.stream, "frame": self.number, "time": round(self.seconds, 4), "size": list(self.size),
            **again, "objects": objects,
        }  # fmt: skip
