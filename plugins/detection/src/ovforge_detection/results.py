"""What one call of the task `detect` takes, and what it gives: detections, one set for each picture."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge.errors import InputError, PluginError
from ovforge.model import OWN_METRIC, PICTURE_SUFFIXES, Picture, Result, open_picture
from ovforge.store import csv_table
from ovforge_detection.decode import overlap

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Decoding", "DetectInputs", "Detections", "DetectionsResult", "draw"]

_COLOURS = ("#e6194b", "#0b7a3b", "#1f57d6", "#b35900", "#7a1fa2", "#00747a", "#a8005c", "#5b5f00")
Floats = NDArray[np.float32]


class DetectInputs(BaseModel):
    """What one call of the task `detect` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    image: Picture | list[Picture] = Field(description="A picture, several, or a folder of them.")
    text: str | list[str] | None = Field(
        None, description='What to find: "Horse. Clouds." or a list. Models with classes of their own: which of them.'
    )
    threshold: float | None = Field(None, ge=0, le=1, description="Score that boxes need; by default the model's own.")
    text_threshold: float = Field(0.25, ge=0, le=1, description="Score that words need to be named with a box.")
    nms: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Overlap (IoU) above which the lower score of a label goes; by default the model's. 1 keeps all.",
    )
    limit: int = Field(300, ge=1, description="The most boxes to return for a picture: those with the highest scores.")


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, from the highest score to the lowest.

    `boxes` are float32 (n, 4): left, top, right, bottom, in pixels of the upright picture; `scores` float32 (n,);
    `classes` int64 (n,), positions in `names`. For models that read text, `words` are those that a box answers to, and
    `spans` (n, 2) the first token of them and the one after the last.
    """

    picture: str
    size: tuple[int, int]
    """Width, height."""
    boxes: Floats
    scores: Floats
    classes: NDArray[np.int64]
    names: Sequence[str]
    words: Sequence[str] = ()
    spans: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """The name of each box's class."""
        return [self.names[number] for number in self.classes]

    def take(self, which: Any) -> Detections:
        """Return these of the boxes: positions or a mask, (n,)."""
        order = np.arange(len(self))[which]
        return Detections(
            self.picture, self.size, self.boxes[order], self.scores[order], self.classes[order], self.names,
            [self.words[n] for n in order] if len(self.words) else (),
            None if self.spans is None else self.spans[order],
        )  # fmt: skip

    def to_supervision(self) -> Any:
        """Return them as supervision's Detections, with `class_name`, `words` and `spans` among their data."""
        try:
            import supervision
        except ImportError as error:
            raise PluginError(f"needs supervision: {error}", hint="Run: pip install supervision") from error
        data: dict[str, Any] = {"class_name": np.array(self.labels, dtype=str)}
        if self.spans is not None:
            data |= {"words": np.array(self.words, dtype=str), "spans": self.spans}
        return supervision.Detections(
            xyxy=self.boxes.copy(), confidence=self.scores.copy(), class_id=self.classes.copy(), data=data
        )


@dataclass(frozen=True)
class Decoding:
    """The detector's outputs as they came: `decode` returns Detections, one set for each picture, for other `values`.

    `values` are the inputs that count for it, by name, as they are now.
    """

    values: Mapping[str, Any]
    decode: Callable[[Mapping[str, Any]], Sequence[Detections]]


@dataclass
class DetectionsResult(Result):
    """Detections, one set for each picture, and the pictures themselves, for drawing."""

    suffixes: ClassVar[tuple[str, ...]] = (*PICTURE_SUFFIXES, ".json", ".csv", "")

    detections: Sequence[Detections] = ()
    pictures: Sequence[Path | Image.Image] = field(default=(), repr=False)
    _decoding: Decoding | None = field(default=None, repr=False)

    def files(self, path: Path, *, quick: bool = False) -> Iterator[tuple[Path, bytes]]:
        """Yield .json (COCO), .csv, or the annotated pictures: `x.png` becomes `x-1.png`, ... if there are several.

        A path without an ending is a folder, which gets a picture for each, by its name, and detections.json.
        """
        suffix = path.suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            several = len(self.detections) > 1
            for n in range(len(self.detections)):
                file = path.with_stem(f"{path.stem}-{n + 1}") if several else path
                yield file, self._drawn(n, file, quick)
        elif not suffix:
            yield from self._folder(path, quick)
        else:
            yield path, (f"{json.dumps(self.coco(), indent=1)}\n" if suffix == ".json" else self.csv()).encode()

    def lines(self) -> list[str]:
        """Return how many of each label there are in each picture."""
        counted = [(each.picture, Counter(each.labels)) for each in self.detections]
        return [
            f"{picture}: {', '.join(f'{count} {label}' for label, count in labels.items()) or 'nothing found'}"
            for picture, labels in counted
        ]

    def preview(self) -> Image.Image | None:
        """Return the first picture with its boxes drawn."""
        return self.annotated() if self.pictures else None

    def is_empty(self) -> bool:
        """Say whether nothing was found in any picture."""
        return not any(len(each) for each in self.detections)

    def as_json(self) -> Any:
        """Return COCO's form without what it was made with."""
        return {name: part for name, part in self.coco().items() if name != "info"}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The one of `compare`."""
        return (OWN_METRIC,)

    def compare(self, reference: Self, metric: str = OWN_METRIC) -> float:
        """Return how well boxes match: twice the summed overlap (IoU) of those of one class, over the number of boxes.

        1 if all are equal, and if there is none on either side. Raises InputError for results of other pictures.
        """
        self._check_metric(metric)
        if len(self.detections) != len(reference.detections):
            raise InputError(f"{len(self.detections)} pictures and {len(reference.detections)} cannot be compared")
        matched, count = 0.0, 0
        for ours, theirs in zip(self.detections, reference.detections, strict=True):
            count += len(ours) + len(theirs)
            free = np.ones(len(theirs), bool)
            for box, label in zip(ours.boxes, ours.labels, strict=True):
                able = free & (np.array(theirs.labels, dtype=object) == label)
                shared = np.where(able, overlap(box, theirs.boxes), 0)
                if len(shared) and shared.max() >= 0.5:
                    free[shared.argmax()] = False
                    matched += float(shared.max())
        return 2 * matched / count if count else 1.0

    @property
    def adjustable(self) -> Mapping[str, Any]:
        """The thresholds, as far as they count for the model, if the outputs of few pictures are at hand."""
        return self._decoding.values if self._decoding else {}

    def adjusted(self, **values: Any) -> Self:
        """Return what other thresholds give. Raises InputError for other inputs, and ConfigError for wrong values."""
        if self._decoding is None or not values.keys() <= self._decoding.values.keys():
            return super().adjusted(**{name: value for name, value in values.items() if name not in self.adjustable})
        wanted = {**self._decoding.values, **values}
        found = self._decoding.decode(wanted)
        inputs = {**self.provenance.get("inputs", {}), **values}
        return replace(
            self, detections=found, provenance={**self.provenance, "inputs": inputs},
            _decoding=replace(self._decoding, values=wanted),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Leave the detector's outputs out: what decodes them cannot be handed to another process."""
        return {**vars(self), "_decoding": None}

    def compact(self) -> Self:
        """Return it without the detector's outputs."""
        return replace(self, _decoding=None)

    def coco(self) -> dict[str, Any]:
        """Return COCO's object detection format: images, annotations with scores, categories; and our provenance."""
        names = list(dict.fromkeys(name for each in self.detections for name in each.names))
        numbers = {name: number for number, name in enumerate(names, start=1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image, each in enumerate(self.detections, start=1):
            width, height = each.size
            images.append({"id": image, "file_name": each.picture, "width": width, "height": height})
            for n, (box, label) in enumerate(zip(each.boxes.tolist(), each.labels, strict=True)):
                left, top, right, bottom = box
                across, down = right - left, bottom - top
                annotation = {
                    "id": len(annotations) + 1, "image_id": image, "category_id": numbers[label],
                    "bbox": [round(v, 3) for v in (left, top, across, down)], "area": round(across * down, 3),
                    "iscrowd": 0, "score": round(float(each.scores[n]), 6),
                }  # fmt: skip
                if each.spans is not None:
                    annotation |= {"words": each.words[n], "tokens": each.spans[n].tolist()}
                annotations.append(annotation)
        categories = [{"id": number, "name": name} for name, number in numbers.items()]
        info = {"description": "ovforge", "provenance": self.provenance}
        return {"info": info, "images": images, "annotations": annotations, "categories": categories}

    def csv(self) -> str:
        """Return a table: picture, label, score, left, top, right, bottom; no cell is a spreadsheet's formula."""
        rows: list[list[str]] = [["picture", "label", "score", "left", "top", "right", "bottom"]]
        for each in self.detections:
            for label, score, box in zip(each.labels, each.scores, each.boxes.tolist(), strict=True):
                rows.append([each.picture, label, f"{score:.6f}", *(f"{value:.2f}" for value in box)])
        return csv_table(rows)

    def annotated(self, position: int = 0) -> Image.Image:
        """Return a picture with its boxes drawn."""
        return draw(open_picture(self.pictures[position], "image"), self.detections[position])

    def _folder(self, folder: Path, quick: bool) -> Iterator[tuple[Path, bytes]]:
        used: set[Path] = set()
        for n, each in enumerate(self.detections):
            name = Path(each.picture).name if isinstance(self.pictures[n], Path) else f"picture-{n + 1}.png"
            file = folder / name
            if file.suffix.lower() not in PICTURE_SUFFIXES or file in used:
                file = folder / f"{file.stem}-{n + 1}.png"
            used.add(file)
            yield file, self._drawn(n, file, quick)
        yield from self.files(folder / "detections.json")

    def _drawn(self, position: int, file: Path, quick: bool) -> bytes:
        from PIL import Image as Pillow

        buffer, kind = io.BytesIO(), Pillow.registered_extensions()[file.suffix.lower()]
        options = {"compress_level": 1} if quick and kind == "PNG" else {}
        self.annotated(position).save(buffer, kind, **options)
        return buffer.getvalue()


def draw(picture: Image.Image, found: Detections) -> Image.Image:
    """Return a copy of an RGB picture with boxes, labels and scores, lines in proportion to its size."""
    from PIL import ImageDraw, ImageFont

    canvas = picture.copy()
    pen = ImageDraw.Draw(canvas)
    line = max(1, round(min(picture.size) / 300))
    font = ImageFont.load_default(max(10, round(min(picture.size) / 45)))
    for box, label, score, number in reversed(
        list(zip(found.boxes.tolist(), found.labels, found.scores.tolist(), found.classes.tolist(), strict=True))
    ):
        left, top, right, bottom = box
        colour = _COLOURS[number % len(_COLOURS)]
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        text = f"{label} {score:.2f}"
        edge = pen.textbbox((0, 0), text, font=font)
        height = edge[3] + 2 * line
        place = (left, top - height if top >= height else top)
        pen.rectangle((*place, left + edge[2] + 2 * line, place[1] + height), fill=colour)
        pen.text((left + line, place[1] + line), text, fill="white", font=font)
    return canvas
