"""Train the embedded detector; it stops after --minutes, and goes on from its checkpoint when run again.

python words.py --packages node_modules --work work
python train.py --packages node_modules --work work --minutes 75
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from losses import Target, total_loss
from model import build, save, start_from
from scenes import Objects, Scene, compose
from torch.utils.data import DataLoader, IterableDataset
from words import Asker, copy_vocabulary

SIDES = [
    (256, 256), (256, 341), (341, 256), (240, 300), (270, 270), (256, 384), (300, 225), (210, 330),
    (224, 224), (256, 300), (320, 250), (285, 256), (250, 333), (200, 280), (192, 256), (330, 215),
]  # fmt: skip
"""Heights and widths in pixels; strides need not divide them. A few, as each asks for kernels of its own."""

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CLS, SEP, STOP = 101, 102, 1012


class Batches(IterableDataset):  # type: ignore[type-arg]
    """Endless batches, made while the model trains."""

    def __init__(self, packages: Path, work: Path, size: int) -> None:
        self.packages, self.work, self.size = packages, work, size

    def __iter__(self) -> Any:
        """Yield pictures, token ids and targets."""
        cv2.setNumThreads(1)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([time.time_ns(), worker.id if worker else 0])
        asker = Asker(self.work, self.packages)
        objects = Objects(self.packages, asker.things)
        while True:
            height, width = SIDES[rng.integers(len(SIDES))]
            yield batch(rng, asker, [compose(rng, objects, height, width) for _ in range(self.size)])


def batch(rng: np.random.Generator, asker: Asker, scenes: list[Scene]) -> tuple[Any, ...]:
    """Return pictures uint8 (n, 3, h, w), ids (n, tokens), their mask, and targets."""
    rows, meanings = [], []
    for scene in scenes:
        ids, spans = [CLS], []
        for tokens, classes in asker.draw(rng, set(scene.classes)):
            spans.append((len(ids), len(ids) + len(tokens), classes))
            ids += [*tokens, STOP]
        rows.append([*ids, SEP])
        meanings.append(spans)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets = []
    for scene, spans in zip(scenes, meanings, strict=True):
        height, width = scene.picture.shape[:2]
        tokens = torch.zeros(len(scene.classes), longest, dtype=torch.bool)
        for start, end, classes in spans:
            tokens[[n for n, kind in enumerate(scene.classes) if kind in classes], start:end] = True
        asked = tokens.any(1)
        x1, y1, x2, y2 = torch.from_numpy(scene.boxes).reshape(-1, 4).T
        boxes = torch.stack([(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height], 1)
        targets.append(Target(boxes[asked], tokens[asked]))
    pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes])).permute(0, 3, 1, 2)
    return pictures, ids, ids > 0, targets


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Return what the model takes."""
    return (pictures.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def rate(step: int, progress: float) -> float:
    """Return the share of the peak rate: it rises for 300 steps, and falls as a cosine over the time that is given."""
    return min(1.0, (step + 1) / 300) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=75, help="of the whole training, earlier runs included")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--start", type=Path, help="a model to go on from, by a schedule of its own")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build().train().to(memory_format=torch.channels_last)
    if arguments.start:
        start_from(model, arguments.start)
        copy_vocabulary(arguments.start, arguments.work)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    slow = [p for name, p in model.named_parameters() if "sampling_offsets" in name]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 and "sampling_offsets" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim >= 2 and "sampling_offsets" not in name]
    groups = [
        {"params": rest, "weight_decay": 0.02, "scale": 1.0}, {"params": plain, "weight_decay": 0.0, "scale": 1.0},
        {"params": slow, "weight_decay": 0.0, "scale": 0.1},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.99), fused=True)
    checkpoint, step, spent = arguments.work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(stored["model"])
        average.load_state_dict(stored["average"])
        optimizer.load_state_dict(stored["optimizer"])
        step, spent = stored["step"], stored["spent"]
    data = Batches(arguments.packages, arguments.work, arguments.batch)
    feed = iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))
    start = told = time.monotonic() - spent
    sums: dict[str, float] = {}
    while (now := time.monotonic() - start) < 60 * arguments.minutes:
        pictures, ids, mask, targets = next(feed)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * group["scale"] * rate(step, now / 60 / arguments.minutes)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            given = pixels(pictures).to(memory_format=torch.channels_last)
            outputs = model.model(pixel_values=given, input_ids=ids, attention_mask=mask)
            loss, parts = total_loss(model, outputs, targets, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            keep = min(0.998, step / (step + 10))
            for own, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if own.is_floating_point():
                    own.lerp_(other, 1 - keep)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % 50 == 0:
            means = ", ".join(f"{name} {value / 50:.3f}" for name, value in sums.items())
            print(f"{step}: {now / 60:.1f} min, {(time.monotonic() - told) / 50:.2f} s a step; {means}", flush=True)
            sums, told = {}, time.monotonic()
        if step % 500 == 0:
            _store(checkpoint, model, average, optimizer, step, now)
    _store(checkpoint, model, average, optimizer, step, 60 * arguments.minutes)
    save(average.state_dict(), arguments.work / "model", arguments.work / "vocab.txt")


def _store(path: Path, model: Any, average: Any, optimizer: Any, step: int, spent: float) -> None:
    """Write the checkpoint under another name first: what is there stays until this is whole."""
    state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "spent": spent}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
