"""What the detector is trained for: a task-aligned head on the encoder, sets of queries on each decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Target:
    """One picture's truth: boxes (n, 4) as centre and size, 0 to 1, and which tokens name each, boolean (n, tokens)."""

    boxes: Tensor
    tokens: Tensor


def total_loss(model: Any, outputs: Any, targets: list[Target], text_mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Return the sum that is minimised, and its parts."""
    count = max(1, sum(len(target.boxes) for target in targets))
    parts: dict[str, Tensor] = {}
    tokens = text_mask.shape[1]
    logits, boxes = outputs.enc_outputs_class[..., :tokens].float(), outputs.enc_outputs_coord_logits.float().sigmoid()
    parts["encoder class"], parts["encoder box"] = _encoder(logits, boxes, targets, text_mask, count)
    for layer, (logits, boxes) in enumerate(_decoded(model, outputs, text_mask)):
        parts[f"class {layer}"], parts[f"box {layer}"] = _decoder(logits, boxes, targets, text_mask, count)
    total = torch.stack(list(parts.values())).sum()
    return total, {name: float(part.detach()) for name, part in parts.items()}


def _decoded(model: Any, outputs: Any, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return logits and boxes of each decoder layer, as transformers' own forward computes those of the last."""
    found = []
    for layer in range(outputs.intermediate_hidden_states.shape[1]):
        before = outputs.init_reference_points if layer == 0 else outputs.intermediate_reference_points[:, layer - 1]
        hidden = outputs.intermediate_hidden_states[:, layer]
        logits = model.class_embed[layer](hidden, outputs.encoder_last_hidden_state_text, mask)
        boxes = (model.bbox_embed[layer](hidden).float() + torch.special.logit(before.float(), eps=1e-5)).sigmoid()
        found.append((logits[..., : mask.shape[1]].float(), boxes))
    return found


def _focal(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017) with soft targets, as in varifocal loss (Zhang et al. 2021): positives whole."""
    logits = logits.masked_fill(~mask[:, None], 0.0)
    chance = logits.sigmoid()
    weight = torch.where(targets > 0, targets, 0.75 * chance.detach().square())
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight
    return (loss * mask[:, None]).sum()


def _boxes(found: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 and generalised IoU (Rezatofighi et al. 2019) of pairs."""
    each = 5 * (found - wanted).abs().sum(1) + 2 * (1 - _overlaps(found, wanted)[1])
    return (each if weight is None else each * weight).sum()


def _overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of boxes that broadcast against each other."""
    low, high = first[..., :2] - first[..., 2:] / 2, first[..., :2] + first[..., 2:] / 2
    other_low, other_high = second[..., :2] - second[..., 2:] / 2, second[..., :2] + second[..., 2:] / 2
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared
    overlap = shared / union.clamp(min=1e-9)
    return overlap, overlap - (hull - union) / hull.clamp(min=1e-9)


def _named(chance: Tensor, tokens: Tensor) -> Tensor:
    """Return how surely each state is each object: the mean over the tokens that name it, (states, n)."""
    weights = tokens.float()
    return chance @ (weights / weights.sum(1, keepdim=True).clamp(min=1)).T


@torch.no_grad()
def _aligned(chance: Tensor, boxes: Tensor, target: Target, most: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Task-aligned assignment (Feng et al. 2021): places, their objects, and how well they fit, 0 to 1."""
    overlap = _overlaps(boxes[:, None], target.boxes)[0]
    metric = _named(chance, target.tokens).clamp(min=1e-4).sqrt() * overlap.pow(3)
    best, places = metric.topk(min(most, len(boxes)), dim=0)
    mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(0, places, best > 1e-9)
    owner = torch.where(mask, overlap, -1.0).argmax(1)  # a place that two objects want goes to the nearer
    mask &= functional.one_hot(owner, len(target.boxes)).bool()
    chosen, objects = mask.nonzero(as_tuple=True)
    metric = torch.where(mask, metric, 0.0)
    fit = metric / metric.amax(0).clamp(min=1e-9) * torch.where(mask, overlap, 0.0).amax(0)
    return chosen, objects, fit[chosen, objects]


def _encoder(logits: Tensor, boxes: Tensor, targets: list[Target], mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Many places to an object, so that the encoder learns at once; the decoder settles on one."""
    wanted = torch.zeros_like(logits)
    found, truth, weights = [], [], []
    for row, target in enumerate(targets):
        if not len(target.boxes):
            continue
        chosen, objects, fit = _aligned(logits[row].sigmoid(), boxes[row], target)
        wanted[row, chosen] = target.tokens[objects].float() * fit[:, None]
        found.append(boxes[row, chosen])
        truth.append(target.boxes[objects])
        weights.append(fit)
    scores = _focal(logits, wanted, mask) / count
    if not found:
        return scores, scores * 0
    weight = torch.cat(weights)
    return scores, _boxes(torch.cat(found), torch.cat(truth), weight) / weight.sum().clamp(min=1)


def _decoder(logits: Tensor, boxes: Tensor, targets: list[Target], mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One query to an object, by the assignment of least cost (Carion et al. 2020)."""
    wanted = torch.zeros_like(logits)
    found, truth = [], []
    for row, target in enumerate(targets):
        if not len(target.boxes):
            continue
        with torch.no_grad():
            chance = logits[row].masked_fill(~mask[row], -20).sigmoid()
            overlap, general = _overlaps(boxes[row][:, None], target.boxes)
            cost = -4 * _named(chance, target.tokens) + 5 * torch.cdist(boxes[row], target.boxes, p=1) - 2 * general
            states, objects = linear_sum_assignment(cost.numpy())
            near = overlap[states, objects]
        wanted[row, states] = target.tokens[objects].float() * near.clamp(min=0.1)[:, None]
        found.append(boxes[row, states])
        truth.append(target.boxes[objects])
    scores = _focal(logits, wanted, mask) / count
    return scores, _boxes(torch.cat(found), torch.cat(truth)) / count if found else scores * 0
