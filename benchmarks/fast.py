"""What approximations bring: time at Stable Diffusion 1.5's size, and how close pictures of the embedded model stay.

    python benchmarks/fast.py --quality [--pictures 8] [--tiny FOLDER]
    python benchmarks/fast.py --work FOLDER [--size 512] [--steps 20] [--rounds 3] [--genai-python PY]
    python benchmarks/fast.py --transformer [--blocks 6] [--size 256] [--steps 20] [--rounds 3]

Times are of random weights, which they do not depend on, with guidance 7.5 and Euler, each variant in a process of its
own, taking turns; genai runs the same folder (FOLDER keeps it: 7 GB). Pictures are the embedded model's, in float32, of
prompts that nothing was calibrated with. The transformer has the width of Stable Diffusion 3.5 medium's, fewer blocks
and random weights; its whole and its outer part take turns in one process, in processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import stable_diffusion
from side_by_side import peak_mib, report, take_turns

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance_stop = 0.5": {"input": {"guidance_stop": 0.5}},
    "step-cache 3": {"transforms": [("step-cache", {"interval": 3})]},
    "step-cache 3, depth 2": {"transforms": [("step-cache", {"interval": 3, "depth": 2})]},
    "step-cache 5, depth 2": {"transforms": [("step-cache", {"interval": 5, "depth": 2})]},
    "step-cache 3 + guidance_stop": {
        "transforms": [("step-cache", {"interval": 3})], "input": {"guidance_stop": 0.5},
    },
}  # fmt: skip
EMBEDDED = "package:ovforge_lcm/model"


# -- time -----------------------------------------------------------------------------------------------------------


def measure(variant: str, folder: Path, size: int, steps: int, cache: Path, started: float) -> dict[str, Any]:
    """Make a picture of one variant in this process, after one of a few steps; seconds, and MiB at its peak."""
    call = genai(folder, size, cache) if variant == "genai" else ours(variant, folder, size)
    call(2)
    ready = time.time() - started
    start = time.perf_counter()
    call(steps)
    return {"ready": ready, "warm": time.perf_counter() - start, "peak": peak_mib(), "precision": "auto"}


def ours(variant: str, folder: Path, size: int) -> Any:
    """Return a function that makes one picture in a number of steps."""
    import ovforge

    options = VARIANTS[variant]
    inputs = {"width": size, "height": size, "guidance_scale": stable_diffusion.GUIDANCE, **options.get("input", {})}
    pipe = ovforge.Pipeline(
        "text-to-image", source=folder, device=ovforge.Use("cpu"), input=inputs,
        transforms=[ovforge.Use(name, **given) for name, given in options.get("transforms", ())],
    )  # fmt: skip
    return lambda steps: pipe(stable_diffusion.PROMPT, steps=steps, seed=stable_diffusion.SEED)


def genai(folder: Path, size: int, cache: Path) -> Any:
    """Return the same by openvino-genai."""
    import openvino_genai

    pipe = openvino_genai.Text2ImagePipeline(str(folder))
    pipe.reshape(1, size, size, stable_diffusion.GUIDANCE)
    pipe.compile("CPU", CACHE_DIR=str(cache))
    return lambda steps: pipe.generate(
        stable_diffusion.PROMPT, num_inference_steps=steps, guidance_scale=stable_diffusion.GUIDANCE, width=size,
        height=size, rng_seed=stable_diffusion.SEED,
    )  # fmt: skip


# -- the parts of a transformer ---------------------------------------------------------------------------------------


def transformer(blocks: int, size: int, steps: int, rounds: int) -> None:
    """Print the time of a transformer's whole and of its outer part, in float32 for one row, and the memory of both."""
    import numpy as np
    import openvino as ov
    from diffusers import SD3Transformer2DModel

    import ovforge
    import ovforge_diffusion
    from ovforge.testing import extension

    with tempfile.TemporaryDirectory() as scratch:
        SD3Transformer2DModel(
            num_layers=blocks, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
            pooled_projection_dim=2048, qk_norm="rms_norm", pos_embed_max_size=192, in_channels=16, out_channels=16,
        ).save_pretrained(scratch)  # fmt: skip
        bundle = ovforge.open_model(scratch, options={"weights": "f32"}, cache=None)
        bundle.models["transformer"]  # converted while the folder is there
    step_cache = extension(ovforge_diffusion, "transform", "step-cache")
    print(step_cache.create(step_cache.options_model()()).apply(bundle).applied[0])
    rng = np.random.default_rng(0)
    kept = (1, (size // 16) ** 2, 1536)
    inputs = {
        "hidden_states": rng.standard_normal((1, 16, size // 8, size // 8), np.float32),
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 333, 4096), np.float32),
        "pooled_projections": rng.standard_normal((1, 2048), np.float32),
        "ovforge_cached_features": rng.standard_normal(kept, np.float32),
    }
    core, requests, memory = ov.Core(), {}, {}
    for role in ("transformer", "transformer_shallow"):
        model = bundle.models[role]
        names = {name for port in model.inputs for name in port.names} & inputs.keys()
        model.reshape({name: list(inputs[name].shape) for name in names})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        requests[role] = compiled.create_infer_request(), {name: inputs[name] for name in names}
        requests[role][0].infer(requests[role][1])
        memory[role] = peak_mib()
    times: dict[str, list[float]] = {role: [] for role in requests}
    for _ in range(rounds):
        for role, (request, given) in requests.items():
            begun = time.process_time()
            request.infer(given)
            times[role].append(time.process_time() - begun)
    full, outer = (median(each) for each in times.values())
    print(f"whole {full:.2f} s, outer part {outer:.2f} s; peak RSS {memory['transformer']:.0f} MiB, with the outer "
          f"part {memory['transformer_shallow']:.0f} MiB")  # fmt: skip
    for interval in (2, 3, 5):
        runs = -(-steps // interval)
        share = (runs * full + (steps - runs) * outer) / (steps * full)
        print(f"interval = {interval}: {runs} of {steps} steps in full, {share:.2f} of the time")


# -- pictures -------------------------------------------------------------------------------------------------------


def quality(pictures: int, tiny: str) -> None:
    """Print how close pictures of each setting come to those without it, and the time, both of the embedded model."""
    import ovforge
    from ovforge import Use

    settings: dict[str, dict[str, Any]] = {
        f"step-cache {interval}, depth {depth}": {"transforms": [Use("step-cache", interval=interval, depth=depth)]}
        for interval in (2, 3, 5)
        for depth in (1, 2)
    }
    settings["vae-int8"] = {"quantize": ["vae-int8"], "calibration": {"runs": 16}}
    if tiny:
        settings["tiny decoder"] = {"load": {"parts": {"vae_decoder": tiny}}}
    plain = ovforge.Pipeline("text-to-image", source=EMBEDDED, device=Use("cpu", precision="f32"))
    prompts = [one.prompt for one in plain.task.examples(2 * pictures)[1::2]]
    print("| setting | steps | ssim | gmsd | time of plain |\n| --- | ---: | ---: | ---: | ---: |")
    for name, options in settings.items():
        pipe = ovforge.Pipeline("text-to-image", source=EMBEDDED, device=Use("cpu", precision="f32"), **options)
        for steps in (4, 8, 20):
            scores: dict[str, list[float]] = {"ssim": [], "gmsd": []}
            times: list[float] = []
            for seed, prompt in enumerate(prompts):
                theirs, mine = (each(prompt, seed=2 * seed + 1, steps=steps) for each in (plain, pipe))
                times.append(mine.timings.elapsed / theirs.timings.elapsed)
                for metric, values in scores.items():
                    values.append(mine.compare(theirs, metric))
            likeness = " | ".join(f"{fmean(values):.4f}" for values in scores.values())
            print(f"| {name} | {steps} | {likeness} | {median(times):.2f} |", flush=True)


def main() -> None:
    """Compare pictures, or take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true", help="compare pictures of the embedded model")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--tiny", default="", help="the OpenVINO folder of a small decoder")
    parser.add_argument("--transformer", action="store_true", help="time the parts of a transformer")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the transformer")
    parser.add_argument("--work", type=Path, help="where the model of full size is kept")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=(*VARIANTS, "genai"), default=list(VARIANTS))
    parser.add_argument("--genai-python", help="an interpreter that has openvino-genai")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quality:
        quality(arguments.pictures, arguments.tiny)
        return
    if arguments.transformer:
        transformer(arguments.blocks, arguments.size, arguments.steps, arguments.rounds)
        return
    if arguments.work is None:
        parser.error("--work is needed: a folder for a model of several gigabytes; or --quality")
    folder = arguments.work.resolve() / "sd15-openvino"
    if arguments.child:
        variant, cache, started = arguments.child
        print(json.dumps(measure(variant, folder, arguments.size, arguments.steps, Path(cache), float(started))))
        return
    stable_diffusion.prepare(folder)
    shared = ["--work", str(arguments.work), "--size", str(arguments.size), "--steps", str(arguments.steps)]
    commands = {one: [sys.executable, __file__, *shared, "--child", one] for one in arguments.variants}
    if arguments.genai_python:
        commands["genai"] = [arguments.genai_python, __file__, *shared, "--child", "genai"]
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        results = take_turns(commands, Path(scratch), arguments.rounds, uncounted=0)
    columns = {
        "ready": ("start to two steps, s", 1), "warm": (f"{arguments.steps} steps, s", 1), "peak": ("peak RSS, MiB", 0)
    }  # fmt: skip
    report(results, columns, base="genai" if "genai" in commands else "plain")


if __name__ == "__main__":
    main()
