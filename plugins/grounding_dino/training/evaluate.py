"""Score a detector on held-out scenes: mean average precision at an overlap (IoU) of 0.5, all names asked for at once.

    python evaluate.py --packages node_modules --model ../src/ovforge_grounding_dino/model

Training draws its scenes from seeds of the clock; these are of seeds 1,000,000 and on. The model is whatever ovforge
opens as a detector that reads text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scenes import Objects, Thing, compose, read_things

import ovforge

SIZES = [(256, 256), (256, 320), (288, 224), (384, 512), (480, 640)]


def held_out(packages: Path, things: list[Thing], count: int) -> list[Any]:
    """Return scenes that training has not seen, some of sizes that it has not seen either."""
    objects = Objects(packages, things)
    return [
        compose(np.random.default_rng(1_000_000 + number), objects, *SIZES[number % len(SIZES)])
        for number in range(count)
    ]


def main() -> None:
    """Print the mean and the classes from the worst to the best."""
    import supervision
    from supervision.metrics import MeanAveragePrecision

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--model", required=True, help="what ovforge opens as a detector")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--quantize", help="a quantizer or recipe")
    parser.add_argument("--sheet", type=Path, help="draw 12 of them")
    arguments = parser.parse_args()
    things = read_things()
    names = [thing.word for thing in things]
    pipe = ovforge.Pipeline(
        "detect", source=arguments.model, device=ovforge.Use("cpu", precision=arguments.precision),
        quantize=[arguments.quantize] if arguments.quantize else [],
    )  # fmt: skip
    metric, drawn = MeanAveragePrecision(), []
    for scene in held_out(arguments.packages, things, arguments.scenes):
        result = pipe(Image.fromarray(scene.picture), text=names, threshold=0.01)
        found = result.detections[0]
        predicted = supervision.Detections(xyxy=found.boxes, confidence=found.scores, class_id=found.classes)
        truth = supervision.Detections(xyxy=scene.boxes, class_id=np.array(scene.classes, int))
        metric.update(predicted, truth)
        if len(drawn) < 12:
            result.detections = [found.take(found.scores > 0.35)]
            drawn.append(result.annotated().resize((384, 384)))
    score = metric.compute()
    classes = dict(zip(score.matched_classes.tolist(), score.ap_per_class[:, 0].tolist(), strict=True))
    for number in sorted(classes, key=lambda each: classes[each]):
        print(f"{names[number]:12} {classes[number]:.3f}")
    good = sum(value >= 0.8 for value in classes.values())
    print(f"{arguments.scenes} scenes, {len(classes)} classes, {good} of them at 0.8 or better")
    print(f"mAP@0.5 {score.map50:.3f}, mAP@0.5:0.95 {score.map50_95:.3f}")
    if arguments.sheet:
        sheet = Image.new("RGB", (4 * 384, 3 * 384))
        for number, picture in enumerate(drawn):
            sheet.paste(picture, (number % 4 * 384, number // 4 * 384))
        sheet.save(arguments.sheet)


if __name__ == "__main__":
    main()
