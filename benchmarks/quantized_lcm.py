"""A quantized latent consistency model at the size of Stable Diffusion 1.5, side by side with everybody else.

512 x 512, batch 1, 4 steps, no negative prompt: ovforge in float32, bfloat16 and INT8, diffusers on torch, and
optimum-intel and openvino-genai with the folders that ovforge converted and quantized. Weights are random, so that
nothing is downloaded; time, size and memory do not depend on them. Pictures do: `quantization.py` compares those.

    python benchmarks/quantized_lcm.py --work FOLDER --torch-python PY --genai-python PY --optimum-python PY

FOLDER keeps the models for the next time (7 GB). Each is quantized by `ovforge quantize`, in a process of its own, and
each measurement is one, too. Reported: a picture when all is warm, its share of one step, process start to a picture of
one step, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
from peers import Generate
from side_by_side import child, peak_mib, report, take_turns
from stable_diffusion import convert, make

PROMPT, SEED, STEPS, GUIDANCE, SIZE = "a beautiful pink unicorn, 8k", 1234567, 4, 8.0, 512
RECIPES = ("weights-int8", "lcm-int8", "sd-int8-hybrid")
RECORDS = 4
"""Of one picture: neither time nor memory depends on how many there are."""
WANTED = peers.Wanted(PROMPT, SIZE, GUIDANCE, SEED)


# -- the models --------------------------------------------------------------------------------------------------------


def make_lcm(folder: Path) -> None:
    """Write a diffusers folder of an LCM: Stable Diffusion 1.5 with guidance as an embedding, its own scheduler."""
    import diffusers
    import torch

    make(folder, "sd15")  # leaves float16 as torch's default
    torch.manual_seed(1)
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    diffusers.UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256}).save_pretrained(folder / "unet")
    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def prepare(work: Path, names: Sequence[str] = ("torch", "openvino", *RECIPES)) -> None:
    """Make, convert and quantize what is not there, each in a process of its own."""
    again = [sys.executable, __file__, "--work", str(work), "--make"]
    for name in names:
        if (work / f"lcm-{name}").is_dir():
            continue
        measured = child([*again, name], work / "cache", name)
        if measured is None:
            raise SystemExit(f"{name} could not be made")
        print(f"{name}: {measured['seconds']:.0f} s, peak RSS {measured['peak'] / 1024:.1f} GiB", flush=True)


def make_one(work: Path, name: str) -> dict[str, Any]:
    """Make one of the folders; return seconds, and the peak memory of this process."""
    target, start = work / f"lcm-{name}", time.perf_counter()
    if name == "torch":
        make_lcm(target)
    elif name == "openvino":
        convert(work / "lcm-torch", target)
    else:
        from ovforge.cli import main as command

        inputs = work / "inputs.jsonl"
        inputs.write_text(json.dumps({"prompt": PROMPT, "steps": STEPS, "width": SIZE, "height": SIZE}))
        data = [] if name == "weights-int8" else ["--calibration", str(inputs), "--samples", str(RECORDS)]
        sys.argv = ["ovforge", "quantize", str(work / "lcm-openvino"), "-q", name, "-o", str(target), *data]
        try:
            command()
        except SystemExit as ended:
            if ended.code:
                raise
    return {"seconds": time.perf_counter() - start, "peak": peak_mib()}


# -- the tools ---------------------------------------------------------------------------------------------------------


def ovforge(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Our pipeline."""
    import ovforge as package

    pipeline = package.Pipeline("text-to-image", source=folder, device=package.Use("cpu", precision=precision))

    def call(steps: int) -> Any:
        return pipeline(PROMPT, steps=steps, guidance_scale=GUIDANCE, seed=SEED).images[0]

    return call, lambda: pipeline.provenance()["precision"]["unet"]


def diffusers(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Diffusers on torch."""
    import torch
    from diffusers import DiffusionPipeline

    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=kind, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def call(steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator).images[0]

    return call, lambda: precision


def optimum(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """optimum-intel."""
    return peers.optimum(folder, precision, cache, WANTED), lambda: precision


def genai(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """openvino-genai."""
    return peers.genai(folder, precision, cache, WANTED), lambda: precision


TOOLS = {"ovforge": ovforge, "diffusers": diffusers, "optimum-intel": optimum, "genai": genai}

ROWS = {
    f"{tool}, {name} {precision}": (tool, folder, precision)
    for tool, folder, name, precisions in (
        ("diffusers", "torch", "torch", ("f32", "bf16")),
        ("ovforge", "openvino", "no quantizer,", ("f32", "bf16")),
        *(("ovforge", recipe, f"{recipe},", ("f32", "bf16")) for recipe in RECIPES),
        ("optimum-intel", "openvino", "no quantizer,", ("f32", "bf16")),
        ("optimum-intel", "lcm-int8", "lcm-int8,", ("bf16",)),
        ("genai", "openvino", "no quantizer,", ("f32", "bf16")),
        ("genai", "lcm-int8", "lcm-int8,", ("bf16",)),
    )
    for precision in precisions
}
"""Row -> tool, folder, and precision of what is not quantized."""


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(row: str, work: Path, cache: Path, started: float) -> dict[str, Any]:
    """Run one row in this process; `started` is the clock when the process was asked for."""
    tool, name, precision = ROWS[row]
    generate, ran = TOOLS[tool](work / f"lcm-{name}", precision, cache)
    generate(1)
    ready = time.time() - started
    start = time.perf_counter()
    generate(STEPS)
    picture = time.perf_counter() - start
    start = time.perf_counter()
    generate(1)
    one = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (work / f"lcm-{name}" / "unet").iterdir())
    return {
        "ready": ready, "picture": picture, "step": (picture - one) / (STEPS - 1), "peak": peak_mib(),
        "size": size / 1e6, "precision": ran(),
    }  # fmt: skip


def main() -> None:
    """Make what is not there, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", nargs="*", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    for tool in ("torch", "genai", "optimum"):
        parser.add_argument(f"--{tool}-python", default=sys.executable, help=f"the interpreter that has {tool}")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.make:
        print(json.dumps(make_one(work, arguments.make[0])))
        return
    if arguments.child:
        row, cache, started = arguments.child
        print(json.dumps(measure(row, work, Path(cache), float(started))))
        return
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    interpreters = {
        "diffusers": arguments.torch_python, "genai": arguments.genai_python, "optimum-intel": arguments.optimum_python
    }  # fmt: skip
    commands = {
        row: [interpreters.get(ROWS[row][0], sys.executable), __file__, "--work", str(work), "--child", row]
        for row in arguments.rows
    }
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        # Nothing is timed before it is warm, so that no round goes uncounted.
        results = take_turns(commands, Path(scratch), arguments.rounds, uncounted=0)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    columns = {
        "picture": (f"{STEPS} steps, s", 1), "step": ("a step, s", 2), "ready": ("start to one step, s", 1),
        "size": ("UNet on disk, MB", 0), "peak": ("peak RSS, MiB", 0),
    }  # fmt: skip
    report(results, columns, base=next(iter(ROWS)))


if __name__ == "__main__":
    main()
