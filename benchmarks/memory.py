"""What memory a large diffusion transformer takes while it is converted, quantized, started and run.

    python benchmarks/memory.py --work FOLDER [--singles 1 4] [--stages weights-int8 weights-int4]

The architecture is FLUX.1's at its true width (3072), with few blocks, all of one stream, and random weights, of two
depths: what both take alike (libraries, the graph, activations) goes out of the difference, which is what each further
parameter takes. A quantizer's work on one matrix hides a part of it in models of these sizes, so that no less is taken
than its result, which it holds, has for each parameter.
FLUX.1 has 11.9 billion. Each stage is a process of its
own, and is looked at from outside, 50 times a second: memory of its own (anonymous), and pages of files that it has
mapped, which the system drops when memory is short.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_weights import write_random

WHOLE = 11.9e9
"""Parameters of FLUX.1."""

TOKENS, SIDE = 64, 16
"""Words and patches a side of what is run: weights are what is measured here, not activations."""

QUANTIZERS: dict[str, dict[str, Any]] = {
    "weights-int8": {"use": "weights-int8"},
    "weights-int4": {"use": "weights-int4"},
    "auto-round": {"use": "auto-round", "iterations": 0},
}


# -- stages, each in a process of its own ------------------------------------------------------------------------------


def convert(folder: Path, *, disk: bool) -> None:
    """From bfloat16 in safetensors to float16 in OpenVINO's format: small ones in memory, large ones on the `disk`."""
    from ovforge import open_model
    from ovforge_convert import streaming

    streaming.LARGE = 0 if disk else 2**60

    open_model(folder / "torch", cache=None).save(folder / "openvino", replace=True)


def quantize(folder: Path, name: str) -> None:
    """From the converted folder, as `ovforge quantize` does it."""
    from ovforge.run.preparation import prepare

    config = {"load": {"source": str(folder / "openvino")}, "quantize": [QUANTIZERS[name]]}
    prepare(config, cache=None).bundle.save(folder / name, replace=True)


def start(folder: Path, name: str, precision: str, *, again: bool) -> None:
    """Compile and run once, as a pipeline does it: with a cache, which is empty unless it is started `again`."""
    import shutil

    import numpy as np

    from ovforge import Cache, open_model
    from ovforge.contracts import DevicePlan
    from ovforge.run.compiled import compile_model

    cache = folder / f"cache-{name}-{precision}"
    if not again:
        shutil.rmtree(cache, ignore_errors=True)
    bundle = open_model(folder / name, cache=None)
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    plan = DevicePlan("CPU", properties, "CPU", precision, can_export=True)
    compiled = compile_model(bundle, "transformer", plan, Cache(cache))
    if compiled.cached != again:
        raise SystemExit(f"the compiled model {'was not' if again else 'was'} in the cache")
    bundle.models.release("transformer")
    shapes = {
        "hidden_states": (1, SIDE * SIDE, 64), "timestep": (1,), "encoder_hidden_states": (1, TOKENS, 4096),
        "pooled_projections": (1, 768), "txt_ids": (TOKENS, 3), "img_ids": (SIDE * SIDE, 3), "guidance": (1,),
    }  # fmt: skip
    assert compiled.model is not None
    given = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    result = next(iter(compiled.model.create_infer_request().infer(given).values()))
    if not np.isfinite(result).all():
        raise SystemExit("the result is not finite")


def stages() -> dict[str, Callable[[Path], None]]:
    """Return what can be measured, in its order."""
    found: dict[str, Callable[[Path], None]] = {
        "convert, in memory": lambda folder: convert(folder, disk=False),
        "convert, on disk": lambda folder: convert(folder, disk=True),
    }
    for name in QUANTIZERS:
        found[name] = lambda folder, name=name: quantize(folder, name)  # type: ignore[misc]
    for name in ("openvino", *QUANTIZERS):
        for precision in ("bf16", "f32"):
            for again in (False, True):
                row = f"{'second' if again else 'first'} start, {name} {precision}"
                found[row] = lambda folder, name=name, precision=precision, again=again: start(  # type: ignore[misc]
                    folder, name, precision, again=again
                )
    return found


# -- looking at them ---------------------------------------------------------------------------------------------------


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, and its peaks of own and of mapped memory, bytes."""
    peak, begin = {"own": 0.0, "mapped": 0.0}, time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            except OSError:
                break
            found = {name: int(size) * 1024 for name, size in re.findall(r"^Rss(\w+):\s+(\d+) kB", text, re.MULTILINE)}
            peak["own"] = max(peak["own"], found.get("Anon", 0) + found.get("Shmem", 0))
            peak["mapped"] = max(peak["mapped"], found.get("File", 0))
            time.sleep(0.02)
        if process.wait():
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    return {"seconds": time.perf_counter() - begin, **peak}


def prepare_models(work: Path, singles: list[int]) -> list[tuple[Path, int]]:
    """Write the models that are not there; return their folders and parameters."""
    import diffusers

    found = []
    for number in singles:
        folder, note = work / f"flux-{number}", work / f"flux-{number}" / "parameters.json"
        if not note.is_file():
            config = {"num_layers": 0, "num_single_layers": number, "guidance_embeds": True}
            count = write_random(folder / "torch", diffusers.FluxTransformer2DModel, config)
            note.write_text(json.dumps(count))
        found.append((folder, int(json.loads(note.read_text()))))
    return found


def weights_of(folder: Path) -> int:
    """Return the bytes of a written model's weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.bin"))


_CELLS = (("own", 1e9, 2), ("seconds", 1, 0))
"""Figures of both depths in a row of the table: their units, and decimals."""


def main() -> None:
    """Measure both depths in turn, stage by stage."""
    known = stages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept, 10 GB by default")
    parser.add_argument("--singles", type=int, nargs=2, default=(1, 4), help="blocks of one stream, of both depths")
    parser.add_argument("--stages", nargs="*", choices=tuple(known), default=list(known), metavar="STAGE")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, folder = arguments.one
        known[name](Path(folder))
        return
    models = prepare_models(arguments.work.resolve(), sorted(arguments.singles))
    (_, few), (_, many) = models
    print(f"{few / 1e6:.0f} and {many / 1e6:.0f} million parameters\n")
    print("| stage | own memory, GB | bytes for each parameter | of FLUX.1, GB | mapped, bytes for each | seconds |")
    print("| --- " * 6 + "|", flush=True)
    results = {}
    for name in arguments.stages:
        one, two = (watched([sys.executable, __file__, "--work", ".", "--one", name, str(f)]) for f, _ in models)
        small, large = (weights_of(folder / name) if name in QUANTIZERS else 0 for folder, _ in models)
        grown = (large - small) / (many - few)
        each = max((two["own"] - one["own"]) / (many - few), grown)
        whole = two["own"] + each * (WHOLE - many)
        mapped = (two["mapped"] - one["mapped"]) / (many - few)
        results[name] = {"small": one, "large": two, "each": each, "whole": whole}
        own, seconds = (f"{one[key] / unit:.{n}f}, {two[key] / unit:.{n}f}" for key, unit, n in _CELLS)
        print(f"| {name} | {own} | {each:.2f} | {whole / 1e9:.1f} | {mapped:.2f} | {seconds} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
