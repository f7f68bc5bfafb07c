"""Text to image side by side: ovforge, diffusers on torch, openvino-genai, optimum-intel, on the same model.

Every measurement is a process of its own; the tools take turns, so that what else the machine does hits all alike.
Reported: process start to first image, a further image (median of several), peak resident memory, precision.

    python benchmarks/text_to_image.py --torch-python PY --genai-python PY --optimum-python PY

A tool whose interpreter is not given is looked for in this one, and left out with a line if it is not there. The
second start is measured: compiled models are cached where the tool can (ovforge; genai's CACHE_DIR as its own row).
"openvino alone" is what no tool goes below: the runtime reads the three compiled models side by side, and runs them on
zeros as often as a picture needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from side_by_side import peak_mib, report, take_turns

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "plugins/lcm/src/ovforge_lcm/model"
WEIGHTS = ROOT / "plugins/lcm/tests/data/embedded-diffusers"
PROMPT, SEED, STEPS, GUIDANCE, SIZE = "a beautiful pink unicorn, 8k", 1234567, 4, 3.0, 128
WARM = 15
"""Further images in each process."""

Generate = Callable[[], Any]


def ovforge(precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Our pipeline."""
    import ovforge as package

    device = package.Use("cpu", precision=precision)
    pipeline = package.Pipeline("text-to-image", source=MODEL, scheduler="lcm", device=device)
    call = lambda: pipeline(PROMPT, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED).images[0]  # noqa: E731
    return call, lambda: pipeline.provenance()["precision"]["unet"]


def diffusers(precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Diffusers on torch."""
    import torch
    from diffusers import LatentConsistencyModelPipeline

    kind = {"f32": torch.float32, "auto": torch.float32, "bf16": torch.bfloat16}[precision]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(WEIGHTS, torch_dtype=kind, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[0]

    return call, lambda: str(kind).removeprefix("torch.")


def genai(precision: str, cache: Path, cached: bool = True) -> tuple[Generate, Callable[[], str]]:
    """openvino-genai, whose LCM scheduler knows epsilon only: the same work, but no picture to look at."""
    import openvino_genai as package

    options: dict[str, Any] = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    if cached:
        options["CACHE_DIR"] = str(cache / "compiled")
    pipeline = package.Text2ImagePipeline(str(epsilon_model(cache / "model")), "CPU", **options)

    def call() -> Any:
        return pipeline.generate(
            PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=SIZE, height=SIZE, rng_seed=SEED
        ).data[0]

    return call, lambda: precision


def genai_uncached(precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """openvino-genai as its documentation starts it."""
    return genai(precision, cache, cached=False)


def epsilon_model(folder: Path) -> Path:
    """Return a copy of the model whose scheduler says epsilon, made in the round that is not counted."""
    if not folder.exists():
        shutil.copytree(MODEL, folder)
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    return folder


def optimum(precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """optimum-intel."""
    import torch
    from optimum.intel import OVLatentConsistencyModelPipeline

    options = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    pipeline = OVLatentConsistencyModelPipeline.from_pretrained(MODEL, ov_config=options, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Any:
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=SIZE,
            width=SIZE,
            generator=generator,
        ).images[0]

    return call, lambda: precision


def openvino(precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Return what runs the three models on zeros; no tokens, no sampling, no picture."""
    import numpy as np
    import openvino as package

    options: dict[str, Any] = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    core = package.Core()
    core.set_property({"CACHE_DIR": str(cache / "compiled")})
    side = SIZE // 8
    sizes = {"input_ids": (1, 77), "sample": (1, 4, side, side), "latent_sample": (1, 4, side, side), "timestep": (1,)}
    sizes |= {"encoder_hidden_states": (1, 77, -1), "timestep_cond": (1, -1)}
    times = {"text_encoder": 1, "unet": STEPS, "vae_decoder": 1}

    def ready(role: str) -> tuple[Any, list[Any]]:
        model = core.read_model(MODEL / role / "openvino_model.xml")
        shapes = {}
        for port in model.inputs:
            given = sizes[next(name for name in port.names if name in sizes)]
            own = list(port.get_partial_shape())
            shapes[port] = [own[axis] if size == -1 else size for axis, size in enumerate(given)][: len(own)]
        model.reshape({port: package.PartialShape(shape) for port, shape in shapes.items()})
        compiled = core.compile_model(model, "CPU", options)
        zeros = [np.zeros(list(port.get_shape()), port.get_element_type().to_dtype()) for port in compiled.inputs]
        return compiled, zeros

    with ThreadPoolExecutor() as pool:
        models = dict(zip(times, pool.map(ready, times), strict=True))

    def call() -> Any:
        for role, count in times.items():
            compiled, zeros = models[role]
            for _ in range(count):
                last = compiled(zeros)
        return last[0]

    return call, lambda: precision


TOOLS: dict[str, Callable[[str, Path], tuple[Generate, Callable[[], str]]]] = {
    "ovforge": ovforge,
    "diffusers": diffusers,
    "genai": genai_uncached,
    "genai, cached": genai,
    "optimum-intel": optimum,
    "openvino alone": openvino,
}


def measure(tool: str, precision: str, cache: Path, started: float) -> dict[str, Any]:
    """Run one tool in this process; `started` is the clock when the process was asked for."""
    generate, ran = TOOLS[tool](precision, cache)
    generate()
    first = time.time() - started
    warm = []
    for _ in range(WARM):
        start = time.perf_counter()
        generate()
        warm.append(time.perf_counter() - start)
    return {"first": first, "warm": statistics.median(warm), "peak": peak_mib(), "precision": ran()}


def main() -> None:
    """Take turns, then print medians and their ratios to genai's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for tool in ("torch", "genai", "optimum"):
        parser.add_argument(f"--{tool}-python", default=sys.executable, help=f"the interpreter that has {tool}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("f32", "auto"), default="f32")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        tool, cache, started = arguments.child
        print(json.dumps(measure(tool, arguments.precision, Path(cache), float(started))))
        return
    interpreters = {
        "ovforge": sys.executable,
        "diffusers": arguments.torch_python,
        "genai": arguments.genai_python,
        "genai, cached": arguments.genai_python,
        "optimum-intel": arguments.optimum_python,
        "openvino alone": sys.executable,
    }
    commands = {
        tool: [interpreters[tool], __file__, "--precision", arguments.precision, "--child", tool] for tool in TOOLS
    }
    with tempfile.TemporaryDirectory() as scratch:
        results = take_turns(commands, Path(scratch), arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    columns = {
        "first": ("start to first image, s", 2), "warm": ("further image, s", 4), "peak": ("peak RSS, MiB", 0)
    }  # fmt: skip
    report(results, columns, base="genai")


if __name__ == "__main__":
    main()
