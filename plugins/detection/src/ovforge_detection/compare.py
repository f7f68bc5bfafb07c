"""A transformers model on torch instead of the converted one: the same pictures, texts and decoding."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovforge.errors import InputError, PluginError
from ovforge.model import Timings, open_picture
from ovforge_convert import quiet
from ovforge_detection.phrases import Passage
from ovforge_detection.prepare import Prepared
from ovforge_detection.results import Detections, DetectionsResult, draw
from ovforge_detection.task import Detect

__all__ = ["differences", "on_torch", "side_by_side"]


class _OnTorch(Detect):
    """The task, its detector run by transformers in float32."""

    def __init__(self, task: Detect, model: Any) -> None:
        self.__dict__.update(task.__dict__)
        self._model = model

    def _infer_text(
        self, pictures: Sequence[Prepared], passages: Sequence[Passage], timings: Timings
    ) -> dict[str, Any]:
        length = max(len(passage.tokens) for passage in passages)
        each = list(pictures) * (len(passages) // len(pictures))
        return self._torch(
            timings,
            pixel_values=np.stack([picture.pixels for picture in each]),
            pixel_mask=np.stack([picture.mask for picture in each]).astype(np.int64),
            input_ids=np.concatenate([passage.padded(length).ids for passage in passages]),
            attention_mask=np.concatenate([passage.padded(length).mask for passage in passages]).astype(np.int64),
        )

    def _infer(self, given: dict[str, Any], shapes: Any, timings: Timings) -> dict[str, Any]:
        return self._torch(timings, **given)

    def _torch(self, timings: Timings, **given: Any) -> dict[str, Any]:
        torch = importlib.import_module("torch")
        with torch.inference_mode(), timings.span("detector"):
            found = self._model(**{name: torch.from_numpy(value) for name, value in given.items()})
        return {"logits": found.logits.numpy(), "boxes": found.pred_boxes.numpy()}


def on_torch(task: Detect, source: str) -> Detect:
    """Return the task with the model of a transformers folder. Raises InputError for another source."""
    folder = Path(source).expanduser()
    if task.spec.kind == "described" or not (folder / "config.json").is_file():
        raise InputError(
            "there is no torch model to compare with", where="--compare", hint="Give --model a transformers folder."
        )
    try:
        transformers = importlib.import_module("transformers")
        importlib.import_module("torch")
    except ImportError as error:
        raise PluginError(
            f"--compare torch needs {error.name}", hint='Run: pip install "ovforge-detection[convert]"'
        ) from error
    auto = "AutoModelForZeroShotObjectDetection" if task.spec.kind == "text" else "AutoModelForObjectDetection"
    with quiet():
        model = getattr(transformers, auto).from_pretrained(folder, local_files_only=True, dtype="float32").eval()
    if getattr(model.config, "anchor_image_size", None):
        model.config.anchor_image_size = None  # else it takes pictures of that size alone
    return _OnTorch(task, model)


def side_by_side(titles: Sequence[str], results: Sequence[DetectionsResult], position: int) -> Image.Image:
    """Return a picture of several results beside each other, each under its title."""
    from PIL import ImageDraw, ImageFont

    picture = open_picture(results[0].pictures[position], "image")
    bar = max(24, picture.height // 20)
    canvas = Image.new("RGB", (picture.width * len(results), picture.height + bar), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(bar * 2 // 3)
    for number, (title, result) in enumerate(zip(titles, results, strict=True)):
        pen.text((picture.width * number + 4, bar // 8), title, fill="black", font=font)
        canvas.paste(draw(picture, result.detections[position]), (picture.width * number, bar))
    return canvas


def differences(ours: Detections, theirs: Detections) -> str:
    """Say how far two results of one picture lie apart."""
    if len(ours) != len(theirs):
        return f"{len(ours)} boxes and {len(theirs)}"
    if not len(ours):
        return "no box in either"
    # Scores that are all but equal may come in another order: each box is held against the nearest.
    apart = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(2)
    nearest = apart.argmin(1)
    same = int((ours.classes == theirs.classes[nearest]).sum())
    boxes, scores = float(apart.min(1).max()), float(np.abs(ours.scores - theirs.scores[nearest]).max())
    return f"{len(ours)} boxes, {same} of the same label; at most {boxes:.2f} pixels and {scores:.4f} of score apart"
