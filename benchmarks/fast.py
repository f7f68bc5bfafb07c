"""What approximations bring: time at Stable Diffusion's size, and how close pictures of the embedded model stay.

    python benchmarks/fast.py --quality [--pictures 8] [--tiny FOLDER]
    python benchmarks/fast.py --work FOLDER [--family sdxl | --lcm] [--size 512] [--rounds 3] [--genai-python PY]
    python benchmarks/fast.py --transformer [--blocks 6] [--size 256] [--steps 20] [--rounds 3]

Times are of random weights, which they do not depend on: 20 Euler steps with guidance 7.5, or, with --lcm, 4 steps of a
latent consistency model. Each variant is a process of its own, and they take turns; other tools run the same folder
without approximations, if --genai-python or --optimum-python names an interpreter that has them. FOLDER keeps it: 7 GB,
or 19 for Stable Diffusion XL. Pictures are the embedded model's, in float32, of prompts that nothing was calibrated
with. The transformer has the width of Stable Diffusion 3.5 medium's, fewer blocks and random weights; its whole and its
outer part take turns in one process, in processor time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peers
import quantized_lcm
import stable_diffusion
from side_by_side import peak_mib, report, take_turns

EULER: dict[str, dict[str, Any]] = {
    "plain": {},
    "guidance_stop = 0.5": {"input": {"guidance_stop": 0.5}},
    "step-cache 3": {"transforms": [("step-cache", {"interval": 3})]},
    "step-cache 3, depth 2": {"transforms": [("step-cache", {"interval": 3, "depth": 2})]},
    "step-cache 5, depth 2": {"transforms": [("step-cache", {"interval": 5, "depth": 2})]},
    "step-cache 5, order 1": {"transforms": [("step-cache", {"interval": 5, "order": 1})]},
    "step-cache 3 + guidance_stop": {
        "transforms": [("step-cache", {"interval": 3})], "input": {"guidance_stop": 0.5},
    },
}  # fmt: skip
LCM: dict[str, dict[str, Any]] = {
    "plain": {},
    "lcm-int8": {"folder": "lcm-int8"},
    "lcm-int8 + vae-int8": {"folder": "vae-int8"},
    "lcm-int8 + tiny decoder": {"folder": "lcm-int8", "decoder": "tiny"},
    "lcm-int8 + vae-int8 + step-cache 2": {"folder": "vae-int8", "transforms": [("step-cache", {"interval": 2})]},
    "lcm-int8 + tiny decoder + step-cache 2": {
        "folder": "lcm-int8",
        "decoder": "tiny",
        "transforms": [("step-cache", {"interval": 2})],
    },
}
"""What is run of the folder `lcm-FOLDER`, with the decoder of another one."""

PEERS = {"genai": peers.genai, "optimum-intel": peers.optimum}

EMBEDDED = "package:ovforge_lcm/model"
SAMPLERS = {"lcm": (4, 8, 20), "euler": (20,)}
"""Steps by sampler. The model's own one adds noise at each step; by Euler's method its pictures are blurred."""


# -- time -----------------------------------------------------------------------------------------------------------


def measure(variant: str, arguments: argparse.Namespace, cache: Path, started: float) -> dict[str, Any]:
    """Make a picture of one variant in this process, after one of a few steps; seconds, and MiB at its peak."""
    call = peer(variant, arguments, cache) if variant in PEERS else ours(variant, arguments)
    call(2)
    ready = time.time() - started
    start = time.perf_counter()
    call(arguments.steps)
    return {"ready": ready, "warm": time.perf_counter() - start, "peak": peak_mib(), "precision": "auto"}


def ours(variant: str, arguments: argparse.Namespace) -> Any:
    """Return a function that makes one picture in a number of steps."""
    import ovforge

    options = (LCM if arguments.lcm else EULER)[variant]
    inputs = {"width": arguments.size, "height": arguments.size, "guidance_scale": guidance(arguments)}
    source = arguments.work / f"lcm-{options['folder']}" if "folder" in options else plain(arguments)
    load = {"parts": {"vae_decoder": str(arguments.work / options["decoder"])}} if "decoder" in options else {}
    pipe = ovforge.Pipeline(
        "text-to-image", source=source, device=ovforge.Use("cpu"), input=inputs | options.get("input", {}), load=load,
        transforms=[ovforge.Use(name, **given) for name, given in options.get("transforms", ())],
    )  # fmt: skip
    return lambda steps: pipe(stable_diffusion.PROMPT, steps=steps, seed=stable_diffusion.SEED)


def peer(tool: str, arguments: argparse.Namespace, cache: Path) -> Any:
    """Return the same by another tool."""
    wanted = peers.Wanted(stable_diffusion.PROMPT, arguments.size, guidance(arguments), stable_diffusion.SEED)
    return PEERS[tool](plain(arguments), "auto", cache, wanted)


def guidance(arguments: argparse.Namespace) -> float:
    return quantized_lcm.GUIDANCE if arguments.lcm else stable_diffusion.GUIDANCE


def plain(arguments: argparse.Namespace) -> Path:
    """Return the folder without approximations."""
    folder: Path = arguments.work / f"{'lcm' if arguments.lcm else arguments.family}-openvino"
    return folder


def prepare(arguments: argparse.Namespace) -> None:
    """Make, convert and quantize what is not there."""
    if not arguments.lcm:
        stable_diffusion.prepare(plain(arguments))
        return
    quantized_lcm.prepare(arguments.work, ("torch", "openvino", "lcm-int8"))
    quantized, tiny = arguments.work / "lcm-vae-int8", arguments.work / "tiny"
    if not quantized.is_dir():
        command = [sys.executable, "-m", "ovforge", "quantize", str(arguments.work / "lcm-lcm-int8"), "-q", "vae-int8"]
        inputs = ["--calibration", str(arguments.work / "inputs.jsonl"), "--samples", "1"]
        subprocess.run([*command, *inputs, "-o", str(quantized)], check=True, stdout=subprocess.DEVNULL)
    if not tiny.is_dir():
        make_tiny(tiny)


def make_tiny(folder: Path) -> None:
    """Write a decoder of the size of TAESD, with random weights."""
    import diffusers

    diffusers.AutoencoderTiny().save_pretrained(folder)


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
    settings |= {
        f"step-cache {interval}, order 1": {"transforms": [Use("step-cache", interval=interval, order=1)]}
        for interval in (3, 5)
    }
    settings["vae-int8"] = {"quantize": ["vae-int8"], "calibration": {"runs": 16}}
    if tiny:
        settings["tiny decoder"] = {"load": {"parts": {"vae_decoder": tiny}}}
    device = Use("cpu", precision="f32")
    print("| setting | sampler | steps | ssim | gmsd | time of plain |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for sampler, lengths in SAMPLERS.items():
        plain = ovforge.Pipeline("text-to-image", source=EMBEDDED, device=device, scheduler=sampler)
        prompts = [one.prompt for one in plain.task.examples(2 * pictures)[1::2]]
        for name, options in settings.items():
            pipe = ovforge.Pipeline("text-to-image", source=EMBEDDED, device=device, scheduler=sampler, **options)
            for steps in lengths:
                scores: dict[str, list[float]] = {"ssim": [], "gmsd": []}
                times: list[float] = []
                for seed, prompt in enumerate(prompts):
                    theirs, mine = (each(prompt, seed=2 * seed + 1, steps=steps) for each in (plain, pipe))
                    times.append(mine.timings.elapsed / theirs.timings.elapsed)
                    for metric, values in scores.items():
                        values.append(mine.compare(theirs, metric))
                likeness = " | ".join(f"{fmean(values):.4f}" for values in scores.values())
                print(f"| {name} | {sampler} | {steps} | {likeness} | {median(times):.2f} |", flush=True)


def main() -> None:
    """Compare pictures, or take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true", help="compare pictures of the embedded model")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--tiny", default="", help="the OpenVINO folder of a small decoder")
    parser.add_argument("--transformer", action="store_true", help="time the parts of a transformer")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the transformer")
    parser.add_argument("--work", type=Path, help="where the model of full size is kept")
    parser.add_argument("--lcm", action="store_true", help="4 steps of a latent consistency model")
    parser.add_argument("--family", choices=tuple(stable_diffusion.SIZES), default="sd15")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, help="20, or 4 with --lcm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="*", metavar="VARIANT", help="some of them, by their names in the table")
    parser.add_argument("--genai-python", help="an interpreter that has openvino-genai")
    parser.add_argument("--optimum-python", help="an interpreter that has optimum-intel")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quality:
        quality(arguments.pictures, arguments.tiny)
        return
    if arguments.transformer:
        transformer(arguments.blocks, arguments.size, arguments.steps or 20, arguments.rounds)
        return
    if arguments.work is None:
        parser.error("--work is needed: a folder for a model of several gigabytes; or --quality")
    arguments.work = arguments.work.resolve()
    arguments.steps = arguments.steps or (4 if arguments.lcm else 20)
    known = LCM if arguments.lcm else EULER
    variants = list(known) if arguments.variants is None else arguments.variants
    if unknown := set(variants) - set(known):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    if arguments.child:
        variant, cache, started = arguments.child
        print(json.dumps(measure(variant, arguments, Path(cache), float(started))))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments)
    shared = ["--work", str(arguments.work), "--size", str(arguments.size), "--steps", str(arguments.steps)]
    shared += ["--lcm"] if arguments.lcm else ["--family", arguments.family]
    commands = {one: [sys.executable, __file__, *shared, "--child", one] for one in variants}
    for tool, python in (("genai", arguments.genai_python), ("optimum-intel", arguments.optimum_python)):
        if python:
            commands[tool] = [python, __file__, *shared, "--child", tool]
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        results = take_turns(commands, Path(scratch), arguments.rounds, uncounted=0)
    columns = {
        "ready": ("start to two steps, s", 1), "warm": (f"{arguments.steps} steps, s", 1), "peak": ("peak RSS, MiB", 0)
    }  # fmt: skip
    report(results, columns, base="genai" if "genai" in commands else "plain")


if __name__ == "__main__":
    main()
