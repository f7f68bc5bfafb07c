"""Adapters on a UNet of Stable Diffusion 1.5's size: fusing, compiling, switching, and what a branch costs a step.

    python benchmarks/lora.py --work /tmp/lora-bench [--precision f32] [--side 64] [--rounds 3]
    python benchmarks/lora.py --layers [--precision f32] [--rounds 10]

The UNet has random weights, the adapter rank 16 on the 192 layers that kohya's scripts train. Each part runs in a
process of its own, one at a time. Beside wall time, processor time is given, which other work disturbs less.

With --layers, the linear layers of that UNet's self-attention at its four sizes take turns in a few seconds: without an
adapter, with one, and with three of rank 16.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RANK = 16
TRAINED = re.compile(r"attn\d\.to_|ff\.net|proj_in|proj_out")


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (wall seconds, processor seconds, result)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - processor, result


def peak() -> float:
    """Return the most memory that this process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prepare(work: Path) -> None:
    """Make the UNet, its conversion and the adapter, if they are not there yet."""
    if (work / "adapter.safetensors").exists():
        return
    import diffusers
    import torch
    from safetensors.numpy import save_file

    from ovforge.model import FileSource, ModelBundle
    from ovforge_diffusers.loader import DiffusersLoader
    from ovforge_diffusers.options import LoaderOptions
    from ovforge_sd_lora.targets import find_targets

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    unet.half().save_pretrained(work / "torch" / "unet")
    del unet
    source = FileSource(work / "torch" / "unet")
    DiffusersLoader(LoaderOptions(weights="f16")).load(source).save(work / "openvino", replace=True)
    bundle, rng, tensors = ModelBundle.open(FileSource(work / "openvino")), np.random.default_rng(0), {}
    for path, target in find_targets("unet", bundle.models["unet"]).items():
        if TRAINED.search(path):
            out, inner, *kernel = target.shape
            name = f"lora_unet_{path.replace('.', '_')}"
            ones = [1] * len(kernel)
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((RANK, inner, *kernel)).astype("f2") / 16
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((out, RANK, *ones)).astype("f2") / 100
            tensors[f"{name}.alpha"] = np.array(RANK / 2, "f2")
    save_file(tensors, work / "adapter.safetensors")


def bundle_of(work: Path) -> Any:
    """Open the converted UNet, with its pages in memory."""
    from ovforge.model import FileSource, ModelBundle

    with (work / "openvino" / "unet" / "openvino_model.bin").open("rb") as file:
        while file.read(2**24):
            pass
    return ModelBundle.open(FileSource(work / "openvino"))


def fixed(model: Any, side: int) -> Any:
    """Return a copy for one picture with guidance, of latents `side` x `side`."""
    copy = model.clone()
    copy.reshape({"sample": [2, 4, side, side], "timestep": [1], "encoder_hidden_states": [2, 77, 768]})
    return copy


def compiled(model: Any, precision: str) -> Any:
    """Compile for the CPU."""
    from ovforge.model import core

    hints = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    return core().compile_model(model, "CPU", hints)


def fuse(arguments: argparse.Namespace) -> dict[str, float]:
    """Load and fuse the adapter, several times, of which the quickest counts; then compile, as new weights need it.

    The peak is of the changed weights, and of those that they were made of, which are mapped from the file.
    """
    from ovforge_sd_lora.options import LoraOptions
    from ovforge_sd_lora.transform import LoraTransform

    options = LoraOptions(path=arguments.work / "adapter.safetensors", mode="fuse")
    spans, held = [], 0.0
    for _ in range(arguments.rounds):
        bundle = bundle_of(arguments.work)
        model, before = bundle.models["unet"], peak()
        spans.append(timed(lambda: LoraTransform(options).apply(bundle))[:2])  # noqa: B023
        held = held or peak() - before
    compile_wall, compile_processor, _ = timed(lambda: compiled(fixed(model, arguments.side), arguments.precision))
    return {
        "fuse_s": min(wall for wall, _ in spans), "fuse_processor_s": min(processor for _, processor in spans),
        "fuse_first_s": spans[0][0], "fuse_peak_gib": held,
        "compile_s": compile_wall, "compile_processor_s": compile_processor,
    }  # fmt: skip


def diffusers_fuse(arguments: argparse.Namespace) -> dict[str, float]:
    """Let diffusers load and fuse the same file, in float32 as its CPU pipelines are, as often."""
    import diffusers
    import torch

    torch.set_num_threads(arguments.threads)
    folder, none, spans = arguments.work / "torch" / "unet", [None] * 3, []
    for _ in range(arguments.rounds):
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
        pipe = diffusers.StableDiffusionPipeline(*none, unet, *none, requires_safety_checker=False)

        def work() -> None:
            pipe.load_lora_weights(arguments.work / "adapter.safetensors")  # noqa: B023
            pipe.fuse_lora(components=["unet"])  # noqa: B023

        spans.append(timed(work)[:2])
    best = [min(span[kind] for span in spans) for kind in (0, 1)]
    return {"diffusers_s": best[0], "diffusers_processor_s": best[1], "diffusers_first_s": spans[0][0]}


def steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Take steps without a branch, with an empty one, and with the adapter in it, in turns; switch adapters."""
    from ovforge.run.adapters import Adapters, Variables
    from ovforge_sd_lora.options import LoraOptions
    from ovforge_sd_lora.switch import running_adapter
    from ovforge_sd_lora.transform import LoraTransform

    bundle = bundle_of(arguments.work)
    plain = compiled(fixed(bundle.models["unet"], arguments.side), arguments.precision)
    options = LoraOptions(path=arguments.work / "adapter.safetensors", name="first", mode="runtime")
    LoraTransform(options).apply(bundle)
    model = compiled(fixed(bundle.models["unet"], arguments.side), arguments.precision)
    variables = Variables()
    adapters = Adapters(bundle.adapters, variables, lambda use: None)  # type: ignore[arg-type, return-value]
    request, without, given = model.create_infer_request(), plain.create_infer_request(), variables.for_request("unet")
    load = timed(lambda: adapters.add(running_adapter(options, bundle)))[0]
    second = LoraOptions(path=options.path, name="second", mode="runtime", scale=0.3)
    swap = timed(lambda: adapters.add(running_adapter(second, bundle)))[0]
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((2, 4, arguments.side, arguments.side), np.float32),
        "timestep": np.array([500]),
        "encoder_hidden_states": rng.standard_normal((2, 77, 768), np.float32),
    }
    spans: dict[str, list[tuple[float, float]]] = {}

    def take(name: str, which: Any) -> None:
        spans.setdefault(name, []).append(timed(lambda: which.infer(inputs))[:2])

    give: dict[str, list[float]] = {}

    def switch(name: str, weights: dict[str, float]) -> None:
        set_ = timed(lambda: adapters.set(weights))[0]
        give.setdefault(name, []).append(set_ + timed(lambda: given(request))[0])

    for _ in range(arguments.rounds + 1):
        take("plain", without)
        switch("off", {})
        take("off", request)
        switch("on", {"first": 1.0})
        take("one", request)
        switch("scale", {"first": 0.5})
        switch("swap", {"second": 0.5})
        switch("both", {"first": 0.5, "second": 0.5})
        take("two", request)
    told = {"load_s": load, "load_second_s": swap, "steps_peak_gib": peak()}
    for name, found in spans.items():
        told[f"step_{name}_s"] = min(wall for wall, _ in found[1:])
        told[f"step_{name}_processor_s"] = min(processor for _, processor in found[1:])
    return told | {f"switch_{name}_ms": 1000 * median(found[1:]) for name, found in give.items()}


SIZES = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))
"""Tokens and width of the UNet's levels at 512 pixels; the batch is 2."""
DEPTH = 6


def layers(precision: str, rounds: int) -> None:
    """Print the processor time of six layers one after another, as a part of that without an adapter."""
    from ovforge.model import core

    print(f"{precision}: tokens x width, then the time of a layer without, ms, and of one with adapters by that")
    for tokens, width in SIZES:
        requests = {}
        for name, count in (("plain", 0), ("one", 1), ("three", 3)):
            hints = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
            request = core().compile_model(chain(tokens, width, count), "CPU", hints).create_infer_request()
            fill(request, width, count)
            requests[name] = request
        x = np.random.default_rng(0).standard_normal((2, tokens, width), np.float32)
        spans: dict[str, list[float]] = {name: [] for name in requests}
        for _ in range(rounds + 1):
            for name, request in requests.items():
                spans[name].append(timed(lambda: request.infer([x]))[1])  # noqa: B023
        best = {name: min(found[1:]) for name, found in spans.items()}
        ratios = ", ".join(f"{name} {span / best['plain']:.2f}" for name, span in best.items() if name != "plain")
        print(f"{tokens} x {width}: {1000 * best['plain'] / DEPTH:.2f}, {ratios}", flush=True)


def chain(tokens: int, width: int, adapters: int) -> Any:
    """Return a model of linear layers with places for adapters."""
    import openvino as ov
    from openvino import opset13 as ops

    from ovforge_sd_lora.runtime import attach
    from ovforge_sd_lora.targets import Target

    rng = np.random.default_rng(0)
    x = ops.parameter([2, tokens, width], ov.Type.f32)
    y, nodes = ops.relu(x), []
    for _ in range(DEPTH):
        weight = (rng.standard_normal((width, width), np.float32) / width**0.5).astype(np.float16)
        product = ops.matmul(y, ops.convert(ops.constant(weight), "f32"), False, True)
        nodes.append(product)
        y = ops.relu(ops.add(product, ops.constant(rng.standard_normal((1, 1, width), np.float32))))
    model = ov.Model([ops.reduce_mean(y, ops.constant(np.array([1])), True)], [x], "layers")
    for number, node in enumerate(nodes if adapters else ()):
        attach(model, Target(str(number), "linear", (width, width), nodes=[node]), "weight")
    return model


def fill(request: Any, width: int, adapters: int) -> None:
    """Give the places of a model random numbers."""
    import openvino as ov

    rng, rank = np.random.default_rng(1), RANK * adapters
    shapes = {"A": (rank, width), "s": (1, rank), "B": (width, rank)}
    for state in request.query_state():
        value = rng.standard_normal(shapes[state.name.rpartition(".")[2]], np.float32) / 100
        state.state = ov.Tensor(value)


PARTS = {"fuse": fuse, "diffusers": diffusers_fuse, "steps": steps}


def main() -> None:
    """Run each part in its own process, and put the figures side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the models, about 4 GB")
    parser.add_argument("--layers", action="store_true", help="single layers, without a folder")
    parser.add_argument("--precision", default="auto", choices=["auto", "f32", "bf16"])
    parser.add_argument("--side", type=int, default=64, help="latents: 64 is 512 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layers:
        layers(arguments.precision, arguments.rounds)
        return
    if arguments.work is None:
        parser.error("--work is needed, or --layers")
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments.work)
    told: dict[str, float] = {}
    for part in PARTS:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--part", part],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"{part}: {done.stderr[-400:]}", file=sys.stderr)
            continue
        told |= json.loads(done.stdout.splitlines()[-1])
    for name, value in told.items():
        print(f"{name:<26} {value:9.3f}")
    ratios = {
        "fuse / compile": ("fuse{}_s", "compile{}_s"),
        "diffusers / fuse": ("diffusers{}_s", "fuse{}_s"),
        "branch, one adapter / plain": ("step_one{}_s", "step_plain{}_s"),
        "branch, off / plain": ("step_off{}_s", "step_plain{}_s"),
        "branch, two adapters / plain": ("step_two{}_s", "step_plain{}_s"),
    }
    for label, (top, bottom) in ratios.items():
        keys = [(top.format(kind), bottom.format(kind)) for kind in ("", "_processor")]
        if all(a in told and b in told for a, b in keys):
            wall, processor = (told[a] / told[b] for a, b in keys)
            print(f"{label:<30} {wall:6.2f} (processor time {processor:.2f})")


if __name__ == "__main__":
    main()
