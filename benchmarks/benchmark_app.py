"""`ovforge benchmark` beside openvino's own benchmark_app: the same models and flags, the tools taking turns.

    python benchmarks/benchmark_app.py --seconds 5 --rounds 3

Prints, for each model and way of calling, the ratio of throughputs and of median latencies, ours to theirs: 1 means
that both tools measure the same. Models are built here with random weights and written below --work.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

Node = Any
_RNG = np.random.default_rng(0)


def weights(*shape: int) -> Node:
    """Return random weights that keep the size of what passes through them."""
    values = _RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    return ops.constant(values.astype(np.float32))


def conv(x: Node, channels: int, outputs: int, size: int = 3, stride: int = 1) -> Node:
    pad = [size // 2] * 2
    return ops.convolution(x, weights(outputs, channels, size, size), [stride] * 2, pad, pad, [1, 1])


def dense(x: Node, inputs: int, outputs: int) -> Node:
    return ops.matmul(x, weights(outputs, inputs), False, True)


def model(name: str, output: list[Node], *inputs: Node) -> ov.Model:
    return ov.Model([ops.result(node) for node in output], list(inputs), name)


def mlp() -> ov.Model:
    """Two layers: so little work that a tool's own overhead shows."""
    x = ops.parameter([1, 64], np.float32, name="x")
    return model("mlp", [dense(ops.relu(dense(x, 64, 128)), 128, 10)], x)


def resnet() -> ov.Model:
    """He et al. 2015: a stem and four stages of residual blocks."""
    x = ops.parameter([1, 3, 224, 224], np.float32, name="image")
    y = ops.max_pool(ops.relu(conv(x, 3, 32, 7, 2)), [2, 2], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    channels = 32
    for stage in range(4):
        for block in range(2):
            outputs, stride = 32 * 2**stage, 2 if stage and not block else 1
            short = y if channels == outputs else conv(y, channels, outputs, 1, stride)
            y = ops.relu(ops.add(conv(ops.relu(conv(y, channels, outputs, 3, stride)), outputs, outputs), short))
            channels = outputs
    pooled = ops.reduce_mean(y, np.array([2, 3]), False)
    return model("resnet", [dense(pooled, channels, 1000)], x)


def encoder() -> ov.Model:
    """Vaswani et al. 2017: four layers of attention over 128 tokens."""
    width, heads, length = 256, 4, 128
    ids = ops.parameter([1, length], np.int64, name="input_ids")
    y = ops.gather(weights(1000, width), ids, ops.constant(np.int64(0)))

    def split(x: Node) -> Node:
        parts = ops.reshape(dense(x, width, width), np.array([1, length, heads, width // heads]), False)
        return ops.transpose(parts, np.array([0, 2, 1, 3]))

    for _ in range(4):
        seen = ops.scaled_dot_product_attention(split(y), split(y), split(y))
        joined = ops.reshape(ops.transpose(seen, np.array([0, 2, 1, 3])), np.array([1, length, width]), False)
        y = ops.mvn(ops.add(y, dense(joined, width, width)), np.array([2]), True, 1e-5, "inside_sqrt")
        y = ops.mvn(ops.add(y, dense(ops.gelu(dense(y, width, 4 * width), "erf"), 4 * width, width)),
                    np.array([2]), True, 1e-5, "inside_sqrt")  # fmt: skip
    return model("encoder", [y], ids)


def detector() -> ov.Model:
    """Boxes and scores at two scales, and the suppression of boxes that overlap."""
    x = ops.parameter([1, 3, 256, 256], np.float32, name="image")
    y, channels = x, 3
    boxes, scores = [], []
    for outputs in (16, 32, 64, 128):
        y, channels = ops.relu(conv(y, channels, outputs, 3, 2)), outputs
        if outputs >= 64:
            for made, count in ((boxes, 4), (scores, 5)):
                flat = ops.reshape(conv(y, outputs, count), np.array([1, count, -1]), False)
                made.append(flat)
    corners = ops.transpose(ops.concat(boxes, 2), np.array([0, 2, 1]))
    kept = ops.non_max_suppression(
        corners, ops.sigmoid(ops.concat(scores, 2)), ops.constant(np.int64(20)), ops.constant(np.float32(0.5)),
        ops.constant(np.float32(0.3)),
    )  # fmt: skip
    return model("detector", [kept.output(0), corners.output(0)], x)


def unet() -> ov.Model:
    """Ronneberger et al. 2015: down, up, and what was seen on the way down joined on the way up."""
    x = ops.parameter([1, 4, 64, 64], np.float32, name="sample")
    y, channels, kept = conv(x, 4, 32), 32, []
    for outputs in (32, 64, 128):
        y = ops.swish(conv(y, channels, outputs))
        kept.append((y, outputs))
        y, channels = ops.swish(conv(y, outputs, outputs, 3, 2)), outputs
    for side, outputs in reversed(kept):
        shape = ops.constant(np.array([1, channels, *side.get_output_shape(0)[2:]]))
        y = ops.interpolate(y, shape, "nearest", "sizes", axes=ops.constant(np.array([0, 1, 2, 3])))
        y = ops.swish(conv(ops.concat([y, side], 1), channels + outputs, outputs))
        channels = outputs
    return model("unet", [conv(y, channels, 4)], x)


MODELS: tuple[Callable[[], ov.Model], ...] = (mlp, resnet, encoder, detector, unet)


def theirs(path: Path, flags: list[str]) -> tuple[float, float]:
    """Return benchmark_app's (throughput, median latency in ms), as it prints them."""
    command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()", "-m", str(path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    median = re.search(r"Median:\s+([\d.]+) (us|ms)", done.stdout)
    fps = re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)
    if not (median and fps):
        raise SystemExit(done.stdout)
    return float(fps[1]), float(median[1]) / (1000 if median[2] == "us" else 1)


def ours(path: Path, flags: list[str]) -> tuple[float, float]:
    """Return ovforge's (throughput, median latency in ms)."""
    command = [sys.executable, "-c", "from ovforge.cli import main; main()", "benchmark", str(path), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    return report["throughput"], report["latency"]["median"] * 1000


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--seconds", type=int, default=5)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--work", type=Path)
    given = reader.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print("| model | api | ours, FPS | theirs | ratio | ours, median ms | theirs | ratio | precision |")
        print("| --- " * 9 + "|")
        for build in MODELS:
            path = (given.work or Path(scratch)) / f"{build.__name__}.xml"
            ov.save_model(build(), path, compress_to_fp16=False)
            for api, hint in (("sync", "latency"), ("async", "throughput")):
                flags = ["-api", api, "-hint", hint, "-t", str(given.seconds), "-infer_precision", "f32"]
                pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
                for number in range(given.rounds):
                    both = [theirs, ours] if number % 2 else [ours, theirs]
                    measured = {tool: tool(path, flags) for tool in both}
                    pairs.append((measured[ours], measured[theirs]))
                cells = []
                for place, digits in ((0, 1), (1, 4)):
                    mine = statistics.median(pair[0][place] for pair in pairs)
                    other = statistics.median(pair[1][place] for pair in pairs)
                    ratios = [pair[0][place] / pair[1][place] for pair in pairs]
                    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                    cells += [f"{mine:.{digits}f}", f"{other:.{digits}f}", spread]
                print(f"| {build.__name__} | {api} | {' | '.join(cells)} | f32 |", flush=True)


if __name__ == "__main__":
    main()
