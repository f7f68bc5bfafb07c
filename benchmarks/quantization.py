"""What quantization brings: the steps of a UNet in turns, its size, and how close pictures stay.

    python benchmarks/quantization.py [--model FOLDER] [--precisions f32 bf16] [--pictures 12] [--rounds 15]
    python benchmarks/quantization.py --tricks
    python benchmarks/quantization.py --peak FOLDER [--samples 4]

Without --model it takes the embedded model; one of full size takes 16 GiB of memory and more, as pipelines stay open:
`quantized_lcm.py` measures each in a process of its own. Pictures are made in float32 of prompts that calibration has
not seen, and compared with those of the unquantized pipeline. `--tricks` takes back, one at a time, the choices that
make the recipe lcm-int8. `--peak` quantizes one UNet in this process and tells the memory that this took; it draws
nothing.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import ovforge
from ovforge import Use
from ovforge.model import FileSource, ModelBundle, core, psnr, ssim
from ovforge_diffusion.examples import prompts

EMBEDDED = Path(__file__).parents[1] / "plugins/lcm/src/ovforge_lcm/model"

VARIANTS: Mapping[str, Use | None] = {
    "none": None,
    "weights-int8": Use("weights-int8", roles=["unet"]),
    "weights-int4": Use("weights-int4", roles=["unet"]),
    "lcm-int8": Use("lcm-int8"),
    "sd-int8-hybrid": Use("sd-int8-hybrid"),
}

TIME = {"patterns": [".*time_emb"]}

TRICKS: Mapping[str, Use | None] = {
    "none": None,
    "lcm-int8": Use("lcm-int8"),
    "without model_type": Use("nncf-ptq", preset="mixed", bias_correction="off", ignored_scope=TIME),
    "preset performance": Use("lcm-int8", preset="performance"),
    "fast bias correction": Use("lcm-int8", bias_correction="fast"),
    "with smoothing": Use("lcm-int8", smooth_quant={}),
    "time embedding too": Use("lcm-int8", ignored_scope={}),
    "NNCF's own defaults": Use("nncf-ptq"),
}
"""lcm-int8, and each of its choices taken back alone."""


def pipelines(arguments: argparse.Namespace, variants: Mapping[str, Use | None]) -> Iterator[tuple[str, Any]]:
    """Yield a pipeline for each variant, calibrated by itself, computing in float32."""
    for name, use in variants.items():
        yield (
            name,
            ovforge.Pipeline(
                "text-to-image",
                source=arguments.model,
                quantize=[use] if use else [],
                calibration={"samples": arguments.samples, "options": {"steps": arguments.steps}} if use else None,
                device=Use("cpu", precision="f32"),
            ),
        )


def pictures(pipeline: Any, arguments: argparse.Namespace) -> list[Any]:
    """Return uint8 pictures of prompts that calibration has not seen."""
    held_out = list(prompts(2 * arguments.pictures))[1::2]
    return [
        np.asarray(pipeline(text, seed=seed, steps=arguments.steps).images[0].convert("RGB")) for seed, text in held_out
    ]


def quality(found: list[Any], expected: list[Any]) -> str:
    """Return the cells SSIM, its worst, PSNR."""
    if not expected:
        return "- | - | -"
    likeness = [ssim(*pair) for pair in zip(found, expected, strict=True)]
    noise = [psnr(*pair) for pair in zip(found, expected, strict=True)]
    return f"{fmean(likeness):.4f} | {min(likeness):.4f} | {fmean(noise):.1f}"


def seconds(pipeline: Any) -> float:
    """Return what quantizing took when it was done, recording apart."""
    return sum(report.seconds or 0.0 for report in pipeline.reports if report.sizes)


def tricks(arguments: argparse.Namespace) -> None:
    """Print what each of the article's three choices changes."""
    expected: list[Any] = []
    print("| quantizer | SSIM | worst | PSNR, dB | seconds |\n| --- | --- | --- | --- | --- |")
    for name, pipeline in pipelines(arguments, TRICKS):
        found = pictures(pipeline, arguments)
        expected = expected or found
        print(f"| {name} | {quality(found, expected)} | {seconds(pipeline):.1f} |", flush=True)


def steps(arguments: argparse.Namespace) -> None:
    """Print step times as ratios to float32's in the same round, sizes, and how close pictures stay."""
    compiled, facts, expected = {}, {}, list[Any]()
    for name, pipeline in pipelines(arguments, VARIANTS):
        found = pictures(pipeline, arguments)
        expected = expected or found
        model = pipeline.bundle.models["unet"]
        size = sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
        facts[name] = f"{size / 1e6:.1f} | {quality(found, expected)}"
        for precision in arguments.precisions:
            hints = {"INFERENCE_PRECISION_HINT": precision}
            compiled[name, precision] = core().compile_model(fixed(model, arguments), "CPU", hints)
    inputs = inputs_of(next(iter(compiled.values())))
    spans: dict[tuple[str, str], list[float]] = {key: [] for key in compiled}
    for number in range(arguments.rounds + 1):
        for key, model in compiled.items():
            start = time.perf_counter()
            model(inputs)
            if number:
                spans[key].append(time.perf_counter() - start)
    base = spans["none", arguments.precisions[0]]
    print("| quantizer | computes in | step, ms | speed-up | MB | SSIM | worst | PSNR, dB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, precision), taken in spans.items():
        gain = median(first / own for first, own in zip(base, taken, strict=True))
        print(f"| {name} | {precision} | {1000 * median(taken):.1f} | {gain:.2f} | {facts[name]} |")
    print(f"\n{core().get_property('CPU', 'FULL_DEVICE_NAME')}; medians of {arguments.rounds} rounds in turns")


def fixed(model: Any, arguments: argparse.Namespace) -> Any:
    """Return a copy for latents of `batch` x 4 x `side` x `side`."""
    copy, batch = model.clone(), arguments.batch
    sides = {"sample": [batch, 4, arguments.side, arguments.side], "timestep": [1]}
    for port in copy.inputs:
        if port.any_name not in sides:
            shape = port.get_partial_shape()
            sides[port.any_name] = [side.get_length() if side.is_static else batch for side in shape]
    if (text := sides.get("encoder_hidden_states")) is not None:
        text[1] = 77
    copy.reshape(sides)
    return copy


def inputs_of(model: Any) -> dict[str, Any]:
    """Return random inputs for a compiled model of fixed shapes."""
    rng = np.random.default_rng(0)
    made = {port.any_name: rng.standard_normal(list(port.shape), np.float32) for port in model.inputs}
    return made | {"timestep": np.array([500])}


class Drawn:
    """Records of random numbers: memory does not depend on what they are."""

    def __init__(self, model: Any, arguments: argparse.Namespace) -> None:
        self._inputs = inputs_of(fixed(model, arguments))

    def inputs(self, role: str, count: int) -> list[dict[str, Any]]:
        """Return the same inputs `count` times."""
        return [self._inputs] * count


def peak(arguments: argparse.Namespace) -> None:
    """Quantize a UNet once, and print seconds and the most memory that this process held."""
    from ovforge import Plugins

    bundle = ModelBundle.open(FileSource(arguments.peak))
    records = Drawn(bundle.models["unet"], arguments)
    recipe = Plugins().find("quantizer", arguments.recipe).extension
    model = recipe.options_model()
    assert model is not None
    quantizer = recipe.create(model.model_validate({"roles": ["unet"], "subset_size": arguments.samples}))
    start = time.perf_counter()
    report = quantizer.quantize(bundle, records)
    took = time.perf_counter() - start
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.recipe}: {took:.0f} s, peak {held:.2f} GiB; {'; '.join(report.applied)}")


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--tricks", action="store_true", help="the three choices of lcm-int8")
    parser.add_argument("--peak", type=Path, metavar="FOLDER", help="memory of quantizing one UNet")
    parser.add_argument("--recipe", default="lcm-int8", help="with --peak")
    parser.add_argument("--samples", type=int, default=48, help="records to calibrate with")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--precisions", nargs="+", default=["f32"], choices=["f32", "bf16"])
    parser.add_argument("--side", type=int, help="latents; by default 16, with --model and --peak 64: 512 pixels")
    parser.add_argument("--batch", type=int, help="by default 1, with --peak 2: both halves of guidance")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    full_size = arguments.peak is not None or arguments.model != EMBEDDED
    arguments.batch = arguments.batch or (2 if arguments.peak else 1)
    arguments.side = arguments.side or (64 if full_size else 16)
    if arguments.peak:
        peak(arguments)
    else:
        (tricks if arguments.tricks else steps)(arguments)


if __name__ == "__main__":
    main()
