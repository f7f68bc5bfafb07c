"""Full-size GroundingDINO with random weights: OpenVINO against transformers on torch.

    python benchmarks/grounding_dino.py [--size 800x1200] [--rounds 2] [--backbone tiny] [--scratch FOLDER]
    python benchmarks/grounding_dino.py --tools "ovforge f32 fixed,ovforge f32 fixed int8,ovforge bf16 fixed,torch bf16"
    python benchmarks/grounding_dino.py --parity          # full depth, 20 sizes and texts, against torch float32 and 64
    python benchmarks/grounding_dino.py --shares          # where the detector's time goes

Each measurement is a process of its own. Both get the same picture, scaled to the same size, and the same text.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grounding_dino_parity
import numpy as np
from PIL import Image
from side_by_side import child, peak_mib

TEXT = "horse. clouds. grasses. sky. hill."
WORDS = [word.strip() for word in TEXT.replace(".", " ").split()]
SWIN = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
}


def make(folder: Path, backbone: str) -> None:
    """Write the model with random weights: parts that are initialised to zero get values, too."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        backbone_config={"model_type": "swin", "out_features": ["stage2", "stage3", "stage4"], **SWIN[backbone]}
    )
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    strong = ("vision_param", "text_param", "bias_table")
    zeros = (*strong, "sampling_offsets", "attention_weights", "bbox_embed", "query_position")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "model.decoder.layer_norm.weight":
                parameter *= 0.1
            if any(part in name for part in zeros):
                parameter += torch.randn(parameter.shape) * (0.3 if any(part in name for part in strong) else 0.05)
    model.save_pretrained(folder)
    words = [f"[unused{n}]" for n in range(config.text_config.vocab_size)]
    words[0], words[100:104], words[1012], words[1029] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"], ".", "?"
    words[2000 : 2000 + len(WORDS)] = WORDS
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.GroundingDinoImageProcessorPil().save_pretrained(folder)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return something with shapes of many sizes."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side * 3 // 2, 3), dtype=np.uint8)).resize((width, height), 3)
        for side in (4, 16, 64)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


def pipeline(folder: Path, size: tuple[int, int] | None, precision: str, cache: Any, **stages: Any) -> Any:
    """Return the task on the CPU."""
    import ovforge

    task = {"use": "detect", **({"size": size} if size else {})}
    load = {"source": str(folder), "weights": "f32"}
    device = {"use": "cpu", "precision": precision}
    return ovforge.load({"task": task, "load": load, "device": device, **stages}, cache=cache)


def int8(folder: Path, height: int, width: int) -> dict[str, Any]:
    """Return the stages that quantize. Four pictures: neither time nor memory of what is quantized depends on it."""
    inputs = []
    for seed in range(4):
        file = folder.parent / f"{height}x{width}-{seed}.png"
        picture(height, width, seed).save(file)
        inputs.append({"image": str(file), "text": TEXT})
    return {
        "quantize": ["detector-int8"],
        "calibration": {"inputs": inputs, "samples": len(inputs), "runs": len(inputs)},
    }


def run_ovforge(folder: Path, height: int, width: int, flags: list[str], precision: str, cache: Path) -> dict[str, Any]:
    """Measure one process: with an empty cache it converts, and quantizes, too."""
    from ovforge import Cache

    image = picture(height, width)
    stages = int8(folder, height, width) if "int8" in flags else {}
    start = time.perf_counter()
    pipe = pipeline(folder, (height, width) if "fixed" in flags else None, precision, Cache(cache), **stages)
    first = pipe(image, text=TEXT)
    ready = time.perf_counter() - start
    seconds = []
    for seed in range(3):
        begin = time.perf_counter()
        pipe(picture(height, width, seed), text=TEXT)
        seconds.append(time.perf_counter() - begin)
    start_timings = pipe.start_timings()
    return {
        "load": start_timings.total("load"), "compile": start_timings.total("compile"), "first": ready,
        "second": min(seconds), "peak": peak_mib(), "precision": first.provenance["precision"]["detector"],
    }  # fmt: skip


def run_torch(folder: Path, height: int, width: int, precision: str) -> dict[str, Any]:
    """Measure transformers."""
    import torch
    import transformers

    start = time.perf_counter()
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    processor = transformers.GroundingDinoProcessor.from_pretrained(folder)
    model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder, dtype=kind).eval()
    loaded = time.perf_counter() - start
    seconds = []
    for seed in range(3):
        begin = time.perf_counter()
        given = processor(images=picture(height, width, seed), text=TEXT, return_tensors="pt")
        given["pixel_values"] = given["pixel_values"].to(kind)
        with torch.inference_mode():
            model(**given)
        seconds.append(time.perf_counter() - begin)
    return {
        "load": loaded, "compile": 0.0, "first": loaded + seconds[0], "second": min(seconds[1:]), "peak": peak_mib(),
        "precision": precision,
    }  # fmt: skip


def sizes_and_texts(folder: Path, pictures: int) -> list[tuple[Any, Any, Any]]:
    """Return pixels, mask and passage of pictures of many sizes, each with a text of its own."""
    from ovforge.model import Timings
    from ovforge_detection.prepare import prepare

    task = pipeline(folder, None, "f32", None).task
    reader, rng = task._text_reader(), np.random.default_rng(0)
    inputs = []
    for number in range(pictures):
        height, width = (int(side) for side in rng.integers(300, 900, 2))
        spec = task.spec.model_copy(update={"shortest": min(height, width), "longest": None})
        prepared = prepare(picture(height, width, number), spec)
        text = [" ".join(rng.choice(WORDS, 1 + number % 3)) for _ in range(1 + number % 7)]
        inputs.append((prepared.pixels, prepared.mask, reader.read(list(dict.fromkeys(text)), Timings())[0]))
    return inputs


def shares(folder: Path, height: int, width: int) -> None:
    """Print what parts of the detector's graph take, by the runtime's own counters, at a fixed size."""
    from ovforge.model import FileSource, core
    from ovforge_grounding_dino.loader import GroundingDinoLoader
    from ovforge_grounding_dino.options import LoaderOptions

    model = GroundingDinoLoader(LoaderOptions(weights="f32")).load(FileSource(folder)).models["detector"]
    tokens = 12
    model.reshape(
        {"pixel_values": [1, 3, height, width], "pixel_mask": [1, height, width], "text_features": [1, tokens, 256],
         "text_mask": [1, tokens], "text_self_mask": [1, tokens, tokens], "text_position_ids": [1, tokens]}
    )  # fmt: skip
    part_of = parts(model)
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True})
    given = {port.any_name: np.ones(list(port.shape), port.element_type.to_dtype()) for port in model.inputs}
    given["pixel_values"] = np.random.default_rng(0).normal(size=given["pixel_values"].shape).astype(np.float32)
    request = compiled.create_infer_request()
    for _ in range(3):
        request.infer(given)
    total: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        try:
            seconds = int(info["execTimeMcs"].astype(str)) / 1e6
        except ValueError:
            continue
        names = info["originalLayersNames"].astype(str).split(",")
        part = next((part_of[name] for name in names if name in part_of), "rest")
        total[part] += seconds
        kinds[f"{part}: {info['layerType'].astype(str)}"] += seconds
    whole = sum(total.values())
    for part, seconds in total.most_common():
        print(f"{part:<22}{seconds:8.3f} s {seconds / whole:7.1%}")
    for kind, seconds in kinds.most_common(12):
        print(f"  {kind:<40}{seconds:8.3f} s")


def parts(model: Any) -> dict[str, str]:
    """Return which part of the network each operation belongs to, by its name.

    The backbone is all before the projections of its maps. Deformable attention reaches from the projections of its
    values, offsets and weights to that of its output.
    """
    found: dict[str, str] = {}
    ends = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for node in model.get_ops():
        name = node.get_friendly_name()
        if any(f"self_attn.{end}" in name or f"encoder_attn.{end}" in name for end in ends):
            found[name] = "deformable attention"
        elif "backbone" in name:
            found[name] = "backbone"
        elif ".fusion_layer" in name:
            found[name] = "fusion with text"
        elif ".decoder." in name:
            found[name] = "decoder"
        elif ".encoder." in name:
            found[name] = "encoder, the rest"

    def walk(start: list[Any], step: Callable[[Any], list[Any]], part: str) -> None:
        """Give a part what `step` leads to from its nodes, up to those of other parts."""
        todo, seen = list(start), {node.get_friendly_name() for node in start}
        found.update(dict.fromkeys(seen, part))
        while todo:
            for node in step(todo.pop()):
                name = node.get_friendly_name()
                if name not in seen and found.get(name, part) == part and node.get_type_name() not in _ENDS:
                    seen.add(name)
                    found[name] = part
                    todo.append(node)

    nodes = model.get_ordered_ops()
    walk([n for n in nodes if "input_proj_vision" in n.get_friendly_name()], before, "backbone")
    grids = [node for node in nodes if node.get_type_name() == "GridSample"]
    walk(grids, after, "deformable attention")
    walk(grids, before, "deformable attention")
    for part in ("deformable attention", "fusion with text"):  # and products of weights that are not modules' own
        walk([n for n in nodes if n.get_type_name() == "Constant" and found.get(n.get_friendly_name()) == part],
             after, part)  # fmt: skip
    return found


def before(node: Any) -> list[Any]:
    """Return the operations that a node reads."""
    return [port.get_node() for port in node.input_values()]


def after(node: Any) -> list[Any]:
    """Return the operations that read a node."""
    return [into.get_node() for port in node.outputs() for into in port.get_target_inputs()]


_ENDS = ("Parameter", "Constant", "Result", "ShapeOf")


def main() -> None:
    """Measure, or be one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="800x1200")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backbone", choices=SWIN, default="tiny")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--tools", default="ovforge f32,ovforge f32 fixed,torch f32")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--pictures", type=int, default=20, help="for --parity")
    parser.add_argument("--doubled", type=int, default=20, help="how many of them torch runs in float64, too")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--one")
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    height, width = map(int, given.size.split("x"))
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="grounding-dino-"))
    folder = scratch / f"swin-{given.backbone}"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.one:
        tool, precision, *flags = given.one.split()
        cache = Path(given.rest[0])
        if tool == "torch":
            print(json.dumps(run_torch(folder, height, width, precision)))
        else:
            print(json.dumps(run_ovforge(folder, height, width, flags, precision, cache)))
        return
    if not folder.is_dir():
        make(folder, given.backbone)
    if given.parity:
        grounding_dino_parity.run(folder, sizes_and_texts(folder, given.pictures), given.doubled)
    elif given.shares:
        shares(folder, height, width)
    else:
        start = [sys.executable, "-W", "ignore", __file__, "--scratch", str(scratch), "--size", given.size]
        start += ["--backbone", given.backbone, "--one"]
        print(
            "| tool | start | load, s | compile, s | first picture after, s | next picture, s | peak, MiB | precision |"
        )
        print("| --- " * 8 + "|")
        for number in range(given.rounds):
            for tool in given.tools.split(","):
                cache = scratch / tool.replace(" ", "-")
                if number == 0:
                    shutil.rmtree(cache, ignore_errors=True)  # the first start converts
                if (one := child([*start, tool, str(cache)], cache, tool)) is not None:
                    cells = [f"{one[key]:.2f}" for key in ("load", "compile", "first", "second")]
                    print(f"| {tool} | {number + 1} | {' | '.join(cells)} | {one['peak']:.0f} | {one['precision']} |",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
