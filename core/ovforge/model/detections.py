"""Object detection: what a detector's model says of itself, what a call takes, and what it gives.

Shared by every detector plugin. A loader puts a `DetectorSpec` into its role `detector`; the task `detect` reads there
how pictures go in and how outputs are decoded; results are `Detections`, one for each picture.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovforge.errors import InputError, ModelError, PluginError
from ovforge.model.pictures import Picture, open_picture
from ovforge.model.results import Result
from ovforge.store.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DetectInputs", "Detections", "DetectionsResult", "DetectorSpec", "draw"]

KEY = "detection"
"""Key of the spec in the role's config.json."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_COLOURS = ("#e6194b", "#0b7a3b", "#1f57d6", "#b35900", "#7a1fa2", "#00747a", "#a8005c", "#5b5f00")
Floats = NDArray[np.float32]


class DetectorSpec(BaseModel):
    """How a role `detector` is used; kept in its config.json under "detection".

    kind "text": inputs pixel_values, pixel_mask, text_features, text_mask, text_self_mask, text_position_ids; outputs
    logits (pictures, queries, tokens) and boxes (pictures, queries, 4), relative centre and size. Beside it there are
    the roles text_encoder (input_ids, text_self_mask, text_position_ids -> text_features) and tokenizer. One picture
    may come with several texts, and is then read with each.

    kind "classes": input pixel_values; outputs logits (pictures, queries, classes) and boxes as above.

    kind "described": any input and outputs; `inputs` and `outputs` are what a model-proc of DL Streamer says of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["text", "classes", "described"]
    shortest: int | None = Field(None, gt=0, description="Shortest side that pictures are scaled to, in pixels.")
    longest: int | None = Field(None, gt=0, description="Longest side that it may lead to.")
    height: int | None = Field(None, gt=0, description="Height of the input, in pixels; without it any.")
    width: int | None = Field(None, gt=0, description="Width of the input, in pixels.")
    resize: Literal["stretch", "fit", "none"] = Field(
        "stretch",
        description="Without `shortest`: to the input's size, into it with the picture's shape, or not at all.",
    )
    bounds: tuple[int, int] | None = Field(
        None, description="Height and width that pictures are scaled to or into, if they are not the input's."
    )
    resample: Literal["linear", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = Field(
        "bilinear", description="Filter that scales. All average what they shrink, but linear, which is OpenCV's."
    )
    crop: Literal["none", "central", "central-resize", "top_left", "top_right", "bottom_left", "bottom_right"] = Field(
        "none", description="Part that is kept of a scaled picture that is larger than the input."
    )
    margin: tuple[int, int] = Field((0, 0), description="Pixels left and right, above and below, that stay empty.")
    centred: bool = Field(False, description="Whether a picture smaller than the input lies in its middle.")
    multiple: int = Field(1, gt=0, description="The sides of the input are multiples of it.")
    fill: tuple[float, ...] = Field((0.0,), description="Pixel around the picture, before it is normalized.")
    colours: Literal["RGB", "BGR"] = "RGB"
    channels: Literal[1, 3, 4] = Field(3, description="Of the input: grey, colours, or colours and opacity.")
    scale: float = Field(1 / 255, description="Pixels are multiplied by it, ...")
    mean: tuple[float, ...] = Field((0.0, 0.0, 0.0), description="... the mean is taken off, ...")
    std: tuple[float, ...] = Field((1.0, 1.0, 1.0), description="... and the rest divided by the deviation.")
    threshold: float = Field(0.5, ge=0, le=1, description="Score that boxes need if the user names none.")
    nms: float | None = Field(None, ge=0, le=1, description="Overlap (IoU) above which the lower score goes.")
    labels: tuple[str, ...] = Field((), description="Names of classes, by their number.")
    queries: int = Field(0, ge=0, description="Fewest places that the picture may have.")
    strides: tuple[int, ...] = Field((), description="Strides of the feature maps.")
    max_tokens: int = Field(256, gt=2)
    delimiters: tuple[int, ...] = Field((), description="Ids of the tokens that end phrases; the first begins a text.")
    outputs: tuple[dict[str, Any], ...] = ()
    input: str = Field("pixel_values", description="Name of the input that takes pictures.")
    inputs: tuple[dict[str, Any], ...] = Field((), description="Further inputs, and what they are filled with.")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    notes: tuple[str, ...] = Field((), description="What results say of how the model was described.")

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "detector/config.json") -> DetectorSpec:
        """Return the spec in a role's config. Raises ModelError if there is none."""
        try:
            return cls.model_validate(config[KEY])
        except KeyError:
            raise ModelError(
                f'it does not say how it is used: the key "{KEY}" is missing',
                where=where,
                hint="Describe a model of another origin by a model-proc file: `ovforge detect --model-proc FILE`, or "
                'load.use = "model-proc" with load.proc.',
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{KEY}.{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from error

    def put(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a role's config with this spec in it."""
        return {**config, KEY: self.model_dump(mode="json", exclude_defaults=True)}


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
    limit: int = Field(300, ge=1, description="Boxes of a picture, at the most: those of the highest scores.")


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


@dataclass
class DetectionsResult(Result):
    """Detections, one for each picture, and the pictures themselves, for drawing."""

    detections: Sequence[Detections] = ()
    pictures: Sequence[Path | Image.Image] = field(default=(), repr=False)

    def save(self, path: Path | str) -> list[Path]:
        """Write .json (COCO), .csv, or the annotated pictures: `x.png` becomes `x-1.png`, ... where there are several.

        A path without suffix is a folder, which gets a picture for each, by its name, and detections.json.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix == ".json":
            atomic_write(target, (json.dumps(self.coco(), indent=1) + "\n").encode())
        elif suffix == ".csv":
            atomic_write(target, self.csv().encode())
        elif suffix in _SUFFIXES:
            return self._draw_all(target)
        elif not suffix:
            return self._save_folder(target)
        else:
            raise InputError(
                f"cannot write {suffix}", where=str(target), hint="Name a .json, .csv, .png or .jpg file, or a folder."
            )
        return [target]

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
        """Return a table: picture, label, score, left, top, right, bottom."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["picture", "label", "score", "left", "top", "right", "bottom"])
        for each in self.detections:
            for label, score, box in zip(each.labels, each.scores, each.boxes.tolist(), strict=True):
                writer.writerow([each.picture, label, f"{score:.6f}", *(f"{value:.2f}" for value in box)])
        return text.getvalue()

    def annotated(self, position: int = 0) -> Image.Image:
        """Return a picture with its boxes drawn."""
        return draw(open_picture(self.pictures[position], "image"), self.detections[position])

    def _draw_all(self, target: Path) -> list[Path]:
        written = []
        for n in range(len(self.detections)):
            file = target.with_stem(f"{target.stem}-{n + 1}") if len(self.detections) > 1 else target
            written.append(self._draw(n, file))
        return written

    def _save_folder(self, folder: Path) -> list[Path]:
        written: list[Path] = []
        for n, each in enumerate(self.detections):
            name = Path(each.picture).name if isinstance(self.pictures[n], Path) else f"picture-{n + 1}.png"
            file = folder / name
            if file.suffix.lower() not in _SUFFIXES or file in written:
                file = folder / f"{file.stem}-{n + 1}.png"
            written.append(self._draw(n, file))
        return [*written, *self.save(folder / "detections.json")]

    def _draw(self, position: int, file: Path) -> Path:
        from PIL import Image as Pillow

        buffer = io.BytesIO()
        self.annotated(position).save(buffer, Pillow.registered_extensions()[file.suffix.lower()])
        atomic_write(file, buffer.getvalue())
        return file


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
