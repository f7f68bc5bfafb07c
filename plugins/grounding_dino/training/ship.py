"""Put what was trained where it ships: the converted model into src, torch weights and scenes beside the tests.

python ship.py work .. --packages node_modules
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from evaluate import held_out
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import read_things

SUPPRESS = 0.7
"""Overlap of boxes of a label above which one goes: training so short leaves some things found twice."""

LIMIT = 12_000_000
"""Bytes that the shipped folder may have."""

SCENES = 30


def main() -> None:
    """Write the folders; a README.md and a NOTICE that are there stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="with model/ and openvino/")
    parser.add_argument("plugin", type=Path)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    arguments = parser.parse_args()
    data = arguments.plugin / "tests" / "data"
    ship(arguments.work / "openvino", arguments.plugin / "src" / "ovforge_grounding_dino" / "model")
    weights = data / "embedded"
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(arguments.work / "model", weights)
    tensors = load_file(weights / "model.safetensors")
    halves = {name: each.half() if each.is_floating_point() else each for name, each in tensors.items()}
    save_file(halves, weights / "model.safetensors", {"format": "pt"})
    write_scenes(arguments.packages, data / "scenes")


def ship(source: Path, target: Path) -> None:
    """Copy what `ovforge convert` made, as small as it can be without changing a number."""
    kept = {path.name: path.read_bytes() for path in target.glob("*") if path.name in ("README.md", "NOTICE")}
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for path in target.rglob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if "detection" in value:
            value["detection"]["nms"] = SUPPRESS
        path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    for path in target.rglob("*.xml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.strip() for line in lines) + "\n", encoding="utf-8")
    for name, content in kept.items():
        (target / name).write_bytes(content)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{size} bytes")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT}")


def write_scenes(packages: Path, folder: Path) -> None:
    """Write some of the held-out scenes, and what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    names, truth = [thing.word for thing in read_things()], {}
    for number, scene in enumerate(held_out(packages, read_things(), SCENES)):
        file = f"{number:02}.jpg"
        Image.fromarray(scene.picture).save(folder / file, quality=90, subsampling=0)
        truth[file] = [
            {"name": names[kind], "box": np.round(box).astype(int).tolist()}
            for kind, box in zip(scene.classes, scene.boxes, strict=True)
        ]
    (folder / "truth.json").write_text(json.dumps({"names": names, "scenes": truth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
