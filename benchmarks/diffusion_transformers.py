"""Stable Diffusion 3.5 medium at its true size, side by side: ovforge, openvino-genai and optimum-intel.

512 x 512, 4 steps with guidance (two rows), without T5: the transformer (2.2 billion parameters) in float32, bfloat16,
and with weights in 8 and 4 bits. Weights are random, so that nothing is downloaded; time, size and memory do not depend
on them. All tools run the same folders, which ovforge converts and quantizes.

    python benchmarks/diffusion_transformers.py --work FOLDER --genai-python PY --optimum-python PY
    python benchmarks/diffusion_transformers.py --work FOLDER --layers 2 --size 128 --rounds 1    # to try it
    python benchmarks/diffusion_transformers.py --work FOLDER --shares   # where the time of a step goes

FOLDER keeps the models for the next time (15 GB). Each measurement is a process of its own, and the tools take turns.
The first round fills caches and is not counted. Reported, with ratios to openvino-genai's row of the same precision:
process start to a picture of one step, a step when all is warm, and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import collections
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
from random_weights import write_random
from side_by_side import child, peak_mib, report, take_turns

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "plugins/lcm/tests/data/embedded-diffusers/tokenizer"
PROMPT, NEGATIVE, SEED, GUIDANCE = "a beautiful pink unicorn, 8k", "blurry", 1234567, 4.5
MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
}  # fmt: skip
LENGTH = 77
"""Places of T5's states, zeros without it: openvino-genai's number. diffusers and ovforge have 256 by default."""

LAYERS, DUAL = 24, 13
"""Blocks of Stable Diffusion 3.5 medium, and how many of them, from the first on, have a second attention."""

FOLDERS = {"f32": ("openvino", "f32"), "bf16": ("openvino", "bf16"), "int8": ("int8", "bf16"), "int4": ("int4", "bf16")}
"""Row -> folder, and the precision that is computed in."""


# -- the models --------------------------------------------------------------------------------------------------------


def make(folder: Path, layers: int) -> None:
    """Write a diffusers folder with random weights."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    words = len(json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8")))
    shared = {
        "vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
    for name, width, depth, heads, activation in (
        ("text_encoder", 768, 12, 12, "quick_gelu"),
        ("text_encoder_2", 1280, 32, 20, "gelu"),
    ):
        config = transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads,
            projection_dim=width, hidden_act=activation, **shared,
        )  # fmt: skip
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / name)
        shutil.copytree(TOKENIZER, folder / name.replace("text_encoder", "tokenizer"))
    diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, sample_size=1024, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    own = {"num_layers": layers, "dual_attention_layers": tuple(range(min(DUAL, layers)))}
    count = write_random(folder / "transformer", diffusers.SD3Transformer2DModel, {**MEDIUM, **own})
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "text_encoder_3": [None, None], "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    print(f"{count / 1e9:.2f} billion parameters", file=sys.stderr)


def make_one(work: Path, name: str, layers: int) -> dict[str, Any]:
    """Make one of the folders; return seconds, and the peak memory of this process."""
    start = time.perf_counter()
    if name == "torch":
        make(work / name, layers)
    elif name == "openvino":
        from ovforge import open_model

        open_model(work / "torch", cache=None).save(work / name)
    else:
        from ovforge.run.preparation import prepare

        quantizer = {"use": f"weights-{name}", "roles": ["transformer"]}
        config = {"load": {"source": str(work / "openvino")}, "quantize": [quantizer]}
        prepare(config, cache=None).bundle.save(work / name)
    return {"seconds": time.perf_counter() - start, "peak": peak_mib()}


def make_all(work: Path, rows: list[str], again: list[str]) -> None:
    """Make what is not there, each in a process of its own."""
    for name in dict.fromkeys(["torch", "openvino", *(FOLDERS[row][0] for row in rows)]):
        if (work / name / "model_index.json").is_file():
            continue
        shutil.rmtree(work / name, ignore_errors=True)  # what an interruption left
        measured = child([*again, "--make", name], work / "cache", name)
        if measured is None:
            raise SystemExit(f"{name} could not be made")
        print(f"{name}: {measured['seconds']:.0f} s, peak RSS {measured['peak'] / 1024:.1f} GiB", flush=True)


# -- the tools ---------------------------------------------------------------------------------------------------------


def ovforge(folder: Path, precision: str, size: int, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """Our pipeline."""
    import ovforge as package

    foreseen = {"width": size, "height": size, "guidance_scale": GUIDANCE, "max_sequence_length": LENGTH}
    device = package.Use("cpu", precision=precision)
    pipeline = package.Pipeline("text-to-image", source=folder, device=device, input=foreseen)

    def call(steps: int) -> Any:
        return pipeline(PROMPT, negative_prompt=NEGATIVE, steps=steps, seed=SEED).images[0]

    return call, lambda: pipeline.provenance()["precision"]["transformer"]


def genai(folder: Path, precision: str, size: int, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """openvino-genai."""
    return peers.genai(folder, precision, cache, _wanted(size)), lambda: precision


def optimum(folder: Path, precision: str, size: int, cache: Path) -> tuple[Generate, Callable[[], str]]:
    """optimum-intel."""
    made = peers.optimum(folder, precision, cache, _wanted(size), max_sequence_length=LENGTH)
    return made, lambda: precision


def _wanted(size: int) -> peers.Wanted:
    return peers.Wanted(PROMPT, size, GUIDANCE, SEED, NEGATIVE)


TOOLS = {"ovforge": ovforge, "genai": genai, "optimum-intel": optimum}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(tool: str, row: str, work: Path, size: int, steps: int, cache: Path, started: float) -> dict[str, Any]:
    """Run one tool in this process; `started` is the clock when the process was asked for."""
    folder, precision = FOLDERS[row]
    generate, ran = TOOLS[tool](work / folder, precision, size, cache)
    generate(1)
    ready = time.time() - started
    seconds = []
    for count in (steps, 1):
        start = time.perf_counter()
        generate(count)
        seconds.append(time.perf_counter() - start)
    many, one = seconds
    return {
        "ready": ready, "picture": many, "step": (many - one) / (steps - 1), "peak": peak_mib(), "precision": ran()
    }  # fmt: skip


def shares(work: Path, row: str, size: int) -> None:
    """Print where the time of a step goes, by the runtime's own counters: types of operations, and their kernels."""
    import numpy as np

    from ovforge import open_model
    from ovforge.model import core

    folder, precision = FOLDERS[row]
    model = open_model(work / folder, cache=None).models["transformer"]
    side = size // 8
    model.reshape(
        {"hidden_states": [2, 16, side, side], "timestep": [2], "encoder_hidden_states": [2, 77 + LENGTH, 4096],
         "pooled_projections": [2, 2048]}
    )  # fmt: skip
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": True})
    rng, request = np.random.default_rng(0), compiled.create_infer_request()
    given = {port.any_name: rng.standard_normal(list(port.shape), np.float32) for port in model.inputs}
    for _ in range(2):
        request.infer(given)
    seconds: collections.Counter[tuple[str, str]] = collections.Counter()
    numbers: collections.Counter[tuple[str, str]] = collections.Counter()
    for info in request.profiling_info:
        key = (info.node_type, info.exec_type)
        seconds[key] += info.real_time.total_seconds()
        numbers[key] += 1
    whole = sum(seconds.values())
    print(f"{row}, {size} x {size}: {whole:.3f} s\n\n| operation | kernel | number | ms | share |\n{'| --- ' * 5}|")
    for (kind, kernel), spent in seconds.most_common(12):
        print(f"| {kind} | {kernel} | {numbers[kind, kernel]} | {spent * 1e3:.1f} | {spent / whole:.1%} |")


def main() -> None:
    """Make what is not there, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the transformer")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--steps", type=int, default=4, help="two or more")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", nargs="*", choices=tuple(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--tools", nargs="*", choices=tuple(TOOLS), default=list(TOOLS))
    parser.add_argument("--shares", action="store_true", help="where the time of a step goes, in each row")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    for tool in ("genai", "optimum"):
        parser.add_argument(f"--{tool}-python", default=sys.executable, help=f"the interpreter that has {tool}")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: a step is the difference of a picture of several steps and one of one")
    folder = arguments.work.resolve()
    work = folder if arguments.make or arguments.child else folder / f"sd35-{arguments.layers}"
    if arguments.make:
        print(json.dumps(make_one(work, arguments.make[0], arguments.layers)))
        return
    if arguments.child:
        tool, row, cache, started = arguments.child
        print(json.dumps(measure(tool, row, work, arguments.size, arguments.steps, Path(cache), float(started))))
        return
    work.mkdir(parents=True, exist_ok=True)
    given = ["--work", str(work), "--layers", str(arguments.layers), "--size", str(arguments.size)]
    given += ["--steps", str(arguments.steps)]
    make_all(work, arguments.rows, [sys.executable, __file__, *given])
    if arguments.shares:
        for row in arguments.rows:
            shares(work, row, arguments.size)
        return
    interpreters = {"genai": arguments.genai_python, "optimum-intel": arguments.optimum_python}
    columns = {
        "ready": ("start to one step, s", 1), "step": ("a step, s", 3), "picture": (f"{arguments.steps} steps, s", 1),
        "peak": ("peak RSS, MiB", 0),
    }  # fmt: skip
    found = {}
    for row in arguments.rows:
        commands = {
            tool: [interpreters.get(tool, sys.executable), __file__, *given, "--child", tool, row]
            for tool in arguments.tools
        }
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            found[row] = take_turns(commands, Path(scratch), arguments.rounds)
        print(f"\n{row}\n", flush=True)
        report(found[row], columns, base="genai")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
