"""Is a converted GroundingDINO the same as transformers', number by number? Called by `grounding_dino.py --parity`.

The decoder starts from the places of the picture that score highest, and learned queries are given to them by rank.
Where two scores are nearer to each other than the rounding of float32, rank is an accident: two queries then change
places, and nothing else may differ. So ranks are compared first, with the gaps of the scores that changed them; then
the outputs, each rank being given the place that torch chose; and torch is compared with itself in float64, to see how
often that happens without us.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["run"]

LOGITS, PIXELS, CLEAR = 1e-3, 0.5, 1e-2
"""What outputs may differ by, and how far from the threshold a score is that must not cross it."""


@dataclass
class Found:
    """One model's answer to one picture.

    Scores are (places,), order (queries,) has the places by rank, logits are (queries, tokens), boxes (queries, 4).
    """

    scores: NDArray[Any]
    order: NDArray[np.int64]
    logits: NDArray[Any]
    boxes: NDArray[Any]


@dataclass
class Total:
    """What is summed up over pictures, ours against torch in float32."""

    pictures: int = 0
    queries: int = 0
    ranks_changed: int = 0
    pictures_with_changed_ranks: int = 0
    places_in_one_set_alone: int = 0
    largest_gap_of_changed_ranks: float = 0.0
    largest_difference_of_scores: float = 0.0
    ranks_changed_by_more_than_rounding: int = 0
    queries_apart: int = 0
    queries_apart_with_the_same_place: int = 0
    queries_apart_by_the_same_ranks: int = 0
    logits_by_the_same_ranks: float = 0.0
    boxes_by_the_same_ranks_in_pixels: float = 0.0
    kept_otherwise_by_the_same_ranks: int = 0
    torch_f64: dict[str, float] = field(default_factory=dict)


def run(folder: Path, inputs: list[tuple[Any, Any, Any]], doubled: int) -> None:
    """Print a line for each (pixels, mask, passage), and the sum as JSON; the first `doubled` run in float64, too."""
    import transformers

    torch_model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    free, forced = ours(folder)
    total = Total()
    answers = []
    for number, (pixels, mask, passage) in enumerate(inputs):
        wanted = by_torch(torch_model, pixels, passage)
        answers.append(wanted)
        found = free(pixels, mask, passage, None)
        moved = found.order != wanted.order
        same = forced(pixels, mask, passage, wanted.order) if moved.any() else found
        side = max(pixels.shape[1:])
        logits, boxes = apart(found, wanted, side)
        off = (logits > LOGITS) | (boxes > PIXELS)
        logits, boxes = apart(same, wanted, side)
        best, ours_best = wanted.logits.max(-1), same.logits.max(-1)
        threshold = np.median(best)
        crossed = ((ours_best > threshold) != (best > threshold)) & (np.abs(best - threshold) > CLEAR)
        gap, rounding, beyond = gaps(found, wanted)
        total.pictures += 1
        total.queries += len(moved)
        total.ranks_changed += int(moved.sum())
        total.pictures_with_changed_ranks += bool(moved.any())
        total.places_in_one_set_alone += len(set(found.order) - set(wanted.order))
        total.largest_gap_of_changed_ranks = max(total.largest_gap_of_changed_ranks, gap)
        total.largest_difference_of_scores = max(total.largest_difference_of_scores, rounding)
        total.ranks_changed_by_more_than_rounding += beyond
        total.queries_apart += int(off.sum())
        total.queries_apart_with_the_same_place += int((off & ~moved).sum())
        total.queries_apart_by_the_same_ranks += int(((logits > LOGITS) | (boxes > PIXELS)).sum())
        total.logits_by_the_same_ranks = max(total.logits_by_the_same_ranks, float(logits.max()))
        total.boxes_by_the_same_ranks_in_pixels = max(total.boxes_by_the_same_ranks_in_pixels, float(boxes.max()))
        total.kept_otherwise_by_the_same_ranks += int(crossed.sum())
        print(
            f"{number + 1}: {pixels.shape[1]}x{pixels.shape[2]}, {passage.ids.shape[1]} tokens: "
            f"{moved.sum()} of {len(moved)} ranks changed (gap {gap:.1e}, scores differ by {rounding:.1e}), "
            f"{off.sum()} queries apart; by the same ranks {((logits > LOGITS) | (boxes > PIXELS)).sum()}, "
            f"logits {logits.max():.1e}, boxes {boxes.max():.4f} px, {crossed.sum()} kept otherwise",
            flush=True,
        )
    del free, forced
    if doubled:
        exact = torch_model.double()
        total.torch_f64 = by_rounding_alone(
            answers[:doubled], [by_torch(exact, pixels, passage) for pixels, _, passage in inputs[:doubled]]
        )
    print(json.dumps(asdict(total), indent=1))


def by_rounding_alone(single: list[Found], double: list[Found]) -> dict[str, float]:
    """Compare torch in float32 with torch in float64, in the same way."""
    moved = [found.order != exact.order for found, exact in zip(single, double, strict=True)]
    measured = [gaps(found, exact) for found, exact in zip(single, double, strict=True)]
    return {
        "pictures": len(moved),
        "ranks_changed": int(sum(each.sum() for each in moved)),
        "pictures_with_changed_ranks": int(sum(bool(each.any()) for each in moved)),
        "largest_gap_of_changed_ranks": max(gap for gap, _, _ in measured),
        "largest_difference_of_scores": max(rounding for _, rounding, _ in measured),
    }


def apart(found: Found, wanted: Found, side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return how far logits and boxes, in pixels, of each query differ at most."""
    return np.abs(found.logits - wanted.logits).max(-1), np.abs(found.boxes - wanted.boxes).max(-1) * side


def gaps(found: Found, wanted: Found) -> tuple[float, float, int]:
    """Return the largest gap that changed ranks, the largest difference of scores, and ranks it cannot excuse.

    If no score differs by more than d, places can only change ranks whose scores lie within 2 d.
    """
    rounding = float(np.abs(found.scores - wanted.scores).max())
    moved = found.order != wanted.order
    between = np.abs(wanted.scores[found.order[moved]] - wanted.scores[wanted.order[moved]])
    return float(between.max(initial=0.0)), rounding, int((between > 2 * rounding).sum())


def by_torch(model: Any, pixels: NDArray[Any], passage: Any) -> Found:
    """Run transformers, in the precision of its weights."""
    import torch

    with torch.inference_mode():
        out = model(
            pixel_values=torch.from_numpy(pixels[None]).to(model.dtype),
            input_ids=torch.from_numpy(passage.ids),
            attention_mask=torch.ones(passage.ids.shape, dtype=torch.int64),
        )
        scores = out.enc_outputs_class.max(-1)[0]
        order = torch.topk(scores, model.config.num_queries, dim=1)[1]
    tokens = passage.ids.shape[1]
    return Found(scores[0].numpy(), order[0].numpy(), out.logits[0, :, :tokens].numpy(), out.pred_boxes[0].numpy())


def ours(folder: Path) -> tuple[Callable[..., Found], Callable[..., Found]]:
    """Return the detector with its scores and ranks as outputs, and the same with ranks as an input."""
    import openvino as ov

    from ovforge.model import FileSource, core
    from ovforge_grounding_dino.loader import GroundingDinoLoader
    from ovforge_grounding_dino.options import LoaderOptions

    bundle = GroundingDinoLoader(LoaderOptions(weights="f32")).load(FileSource(folder))
    runs = []
    for given in (False, True):
        model = bundle.models["detector"].clone()
        (top,) = (node for node in model.get_ops() if node.get_type_name() == "TopK")
        scores, order = top.input_value(0), top.output(1)
        if given:
            ranks = ov.opset13.parameter([-1, -1], order.get_element_type(), name="order")
            ranks.output(0).set_names({"order"})
            for into in order.get_target_inputs():
                into.replace_source_output(ranks.output(0))
            model.add_parameters([ranks])
            order = ranks.output(0)
        else:
            order.set_names({"order"})
        scores.set_names({"scores"})
        model.add_outputs([scores] if given else [scores, order])
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        runs.append(_runner(compiled.create_infer_request()))
    return runs[0], runs[1]


def _runner(request: Any) -> Callable[..., Found]:
    def run(pixels: NDArray[Any], mask: NDArray[Any], passage: Any, order: NDArray[Any] | None) -> Found:
        given = {
            "pixel_values": pixels[None], "pixel_mask": mask[None], "text_features": passage.features,
            "text_mask": passage.mask, "text_self_mask": passage.self_mask, "text_position_ids": passage.positions,
        }  # fmt: skip
        if order is not None:
            given["order"] = order[None]
        out = request.infer(given)
        ranks = order if order is not None else np.array(out["order"][0], np.int64)
        return Found(np.array(out["scores"][0]), ranks, np.array(out["logits"][0]), np.array(out["boxes"][0]))

    return run
