"""Stable Diffusion at its true size, side by side: ovforge, diffusers on torch, openvino-genai, optimum-intel.

The weights are random, which no time depends on, so nothing is downloaded. `--family sd15` has 860 M parameters in
its UNet, `--family sdxl` 2.6 G. All OpenVINO tools run the same converted folder.

    python benchmarks/stable_diffusion.py --work FOLDER --torch-python PY --genai-python PY --optimum-python PY

FOLDER keeps the models (sd15: 7 GB) for the next time. Reported: conversion (time, peak memory), then for each tool
one picture of `--steps` Euler steps with guidance 7.5 after one of a single step (warm), the time of a step, and the
peak resident memory of its process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from peers import Generate
from side_by_side import child, peak_mib, report, take_turns

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "plugins/lcm/tests/data/embedded-diffusers/tokenizer"
PROMPT, NEGATIVE, SEED, GUIDANCE = "a beautiful pink unicorn, 8k", "blurry", 1234567, 7.5
EULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
SIZES = {"sd15": 512, "sdxl": 1024}


# -- the model ---------------------------------------------------------------------------------------------------------


def make(folder: Path, family: str) -> None:
    """Write a diffusers folder of the family's architecture, with random weights in float16."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)  # half the memory, and what such models are stored in
    end = json.loads((TOKENIZER / "vocab.json").read_text())["<|endoftext|>"]
    clip = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    small = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **clip
    )
    large = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280, **clip,
    )  # fmt: skip
    transformers.CLIPTextModel(small).save_pretrained(folder / "text_encoder")
    names = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    unet: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
    if family == "sdxl":
        transformers.CLIPTextModelWithProjection(large).save_pretrained(folder / "text_encoder_2")
        names |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        unet = {
            "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
    diffusers.UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=SIZES[family],
    ).save_pretrained(folder / "vae")  # fmt: skip
    for name in [name for name in names if name.startswith("tokenizer")]:
        shutil.copytree(TOKENIZER, folder / name)
    diffusers.EulerDiscreteScheduler(**EULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **names,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if family == "sd15":
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Convert with ovforge; return seconds and peak memory of this process."""
    from ovforge.model import FileSource
    from ovforge_diffusers.loader import DiffusersLoader
    from ovforge_diffusers.options import LoaderOptions

    start = time.perf_counter()
    DiffusersLoader(LoaderOptions()).load(FileSource(source)).save(target, replace=True)
    return {"seconds": time.perf_counter() - start, "peak": peak_mib()}


# -- the tools ---------------------------------------------------------------------------------------------------------


def ovforge(folder: Path, precision: str, cache: Path, **options: Any) -> tuple[Generate, Callable[[], str]]:
    """Our pipeline, compiled for the model's own size."""
    import ovforge as package

    pipeline = package.Pipeline(
        package.Use("text-to-image", **options), source=folder, device=package.Use("cpu", precision=precision)
    )

    def call(steps: int) -> Any:
        made = pipeline(PROMPT, negative_prompt=NEGATIVE, steps=steps, guidance_scale=GUIDANCE, seed=SEED)
        return made.images[0]

    return call, lambda: pipeline.provenance()["precision"]["unet"]


def ovforge_split(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """The halves of guidance in two calls."""
    return ovforge(folder, precision, cache, guidance="split")


def ovforge_low_memory(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """One role in memory at a time: each picture reads them all again."""
    return ovforge(folder, precision, cache, low_memory=True)


def diffusers(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Diffusers on torch."""
    import torch
    from diffusers import DiffusionPipeline

    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(torch_folder(folder), torch_dtype=kind, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def call(steps: int) -> Any:
        return pipeline(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=steps, guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]  # fmt: skip

    return call, lambda: str(kind).removeprefix("torch.")


def optimum(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """optimum-intel."""
    return peers.optimum(folder, precision, cache, _wanted(folder)), lambda: precision


def genai(folder: Path, precision: str, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """openvino-genai."""
    return peers.genai(folder, precision, cache, _wanted(folder)), lambda: precision


def _wanted(folder: Path) -> peers.Wanted:
    return peers.Wanted(PROMPT, SIZES[family_of(folder)], GUIDANCE, SEED, NEGATIVE)


TOOLS: dict[str, Callable[[Path, str, Path], tuple[Generate, Callable[[], str]]]] = {
    "ovforge": ovforge,
    "ovforge, split guidance": ovforge_split,
    "ovforge, low memory": ovforge_low_memory,
    "diffusers": diffusers,
    "genai": genai,
    "optimum-intel": optimum,
}


def torch_folder(folder: Path) -> Path:
    """Return the torch model beside a converted one."""
    return folder.with_name(f"{family_of(folder)}-torch")


def family_of(folder: Path) -> str:
    return folder.name.partition("-")[0]


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(tool: str, folder: Path, precision: str, steps: int, cache: Path, started: float) -> dict[str, Any]:
    """Run one tool in this process; `started` is the clock when the process was asked for."""
    generate, ran = TOOLS[tool](folder, precision, cache)
    generate(1)
    ready = time.time() - started
    start = time.perf_counter()
    generate(steps)
    warm = time.perf_counter() - start
    start = time.perf_counter()
    generate(1)
    one = time.perf_counter() - start
    return {
        "ready": ready, "warm": warm, "step": (warm - one) / (steps - 1), "peak": peak_mib(), "precision": ran(),
    }  # fmt: skip


def main() -> None:
    """Make and convert what is not there, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the models are kept")
    parser.add_argument("--family", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", choices=("f32", "bf16", "auto"), default="auto")
    parser.add_argument("--tools", nargs="*", choices=tuple(TOOLS), default=list(TOOLS))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    for tool in ("torch", "genai", "optimum"):
        parser.add_argument(f"--{tool}-python", default=sys.executable, help=f"the interpreter that has {tool}")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        source, target, _ = arguments.convert
        print(json.dumps(convert(Path(source), Path(target))))
        return
    if arguments.work is None:
        parser.error("--work is needed: a folder for models of several gigabytes")
    converted = arguments.work.resolve() / f"{arguments.family}-openvino"
    if arguments.child:
        tool, cache, started = arguments.child
        measured = measure(tool, converted, arguments.precision, arguments.steps, Path(cache), float(started))
        print(json.dumps(measured))
        return
    prepare(converted)
    interpreters = {
        "diffusers": arguments.torch_python, "genai": arguments.genai_python, "optimum-intel": arguments.optimum_python
    }  # fmt: skip
    shared = ["--work", str(arguments.work), "--family", arguments.family]
    shared += ["--steps", str(arguments.steps), "--precision", arguments.precision]
    commands = {
        tool: [interpreters.get(tool, sys.executable), __file__, *shared, "--child", tool] for tool in arguments.tools
    }
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        # Nothing is timed before it is warm, so that no round goes uncounted.
        results = take_turns(commands, Path(scratch), arguments.rounds, uncounted=0)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    columns = {
        "ready": ("start to one step, s", 1), "warm": (f"{arguments.steps} steps, s", 1), "step": ("a step, s", 3),
        "peak": ("peak RSS, MiB", 0),
    }  # fmt: skip
    report(results, columns, base="genai")


def prepare(converted: Path) -> None:
    """Make the torch model, and convert it in a process of its own."""
    source = torch_folder(converted)
    if not (source / "model_index.json").is_file():
        make(source, family_of(converted))
    if not converted.is_dir():
        command = [sys.executable, __file__, "--convert", str(source), str(converted)]
        if measured := child(command, converted.with_name("cache"), "conversion"):
            print(f"conversion: {measured['seconds']:.1f} s, peak RSS {measured['peak']:.0f} MiB\n", flush=True)


if __name__ == "__main__":
    main()
