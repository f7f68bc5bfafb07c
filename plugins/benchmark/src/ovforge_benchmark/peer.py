"""diffusers on torch as a candidate of a comparison. Only here is torch imported."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovforge.errors import InputError, ModelError, PluginError
from ovforge.model import ImagesResult, Timings
from ovforge_benchmark.machine import peak_memory
from ovforge_benchmark.noise import Watch
from ovforge_benchmark.process import hand_over

__all__ = ["measure_diffusers"]

_NAMES = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "num_inference_steps", "width": "width",
    "height": "height", "guidance_scale": "guidance_scale", "seed": "generator",
}  # fmt: skip
"""Our names of inputs, and those that diffusers' text-to-image pipelines have for them."""

_WEIGHTS = (".safetensors", ".bin")


def measure_diffusers(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same as `worker.measure_pipeline` with diffusers: `config` is a folder, `dtype` f32, bf16 or f16."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise PluginError(
            "comparing with diffusers needs torch and diffusers",
            where=error.name,
            hint="Run: pip install 'ovforge-diffusers[convert]'",
        ) from error
    folder = Path(job["config"])
    kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[job["dtype"]]
    start = time.perf_counter()
    try:
        open_folder: Any = diffusers.DiffusionPipeline.from_pretrained
        pipe = open_folder(folder, torch_dtype=kind, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"diffusers does not open it: {error}", where=str(folder), hint="Name a diffusers folder with safetensors."
        ) from error
    loaded = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    calls = [_arguments(call, torch) for call in job["calls"]]
    stages: dict[str, list[float]] = {"load": [loaded]}
    clock = _Clock(pipe)
    pictures: list[Any] = []
    for number in range(job["warmup"]):
        for call in calls:
            seconds, _, _ = clock.run(call)
            if number == 0:
                stages.setdefault("first call", []).append(seconds)
    with Watch() as watch:
        for _ in range(job["runs"]):
            pictures = []
            for call in calls:
                seconds, image, timings = clock.run(call)
                pictures.append(image)
                stages.setdefault("total", []).append(seconds)
                for name in timings.spans:
                    stages.setdefault(name, []).append(timings.total(name))
    peak = peak_memory()
    if job["results"]:
        hand_over([ImagesResult(images=[image]) for image in pictures], Path(job["results"]))
    parts = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    return {
        "stages": stages,
        "peak_memory": peak,
        "precision": dict.fromkeys(parts, job["dtype"]),
        "provenance": {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}},
        "inputs": job["calls"],
        "sizes": {name: _weights(folder / name) for name in parts} if job["sizes"] else {},
        "warnings": [],
        "noise": watch.warnings(),
    }


def _arguments(call: Mapping[str, Any], torch: Any) -> dict[str, Any]:
    """Return diffusers' arguments for our inputs. Raises InputError for those that it has no equal for."""
    if unknown := sorted(set(call) - set(_NAMES) - {"count"}):
        raise InputError(f"no equal of {', '.join(unknown)}", where="diffusers", hint=f"It takes: {', '.join(_NAMES)}.")
    if call.get("count", 1) != 1:
        raise InputError("makes one picture a call", where="diffusers: count", hint="Leave count out.")
    # A generator is used up by a run: it is made anew each time.
    values = {**call, "seed": functools.partial(torch.Generator("cpu").manual_seed, call.get("seed", 0))}
    return {_NAMES[name]: value for name, value in values.items() if name in _NAMES}


class _Clock:
    """Times a pipeline's parts by standing in their places; denoising is from the first UNet to the last step."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._timings = pipe, Timings()
        self._first = self._last = 0.0
        pipe.encode_prompt = self._spanned("text_encoder", pipe.encode_prompt)
        pipe.unet.forward = self._spanned("denoise.unet", pipe.unet.forward)
        pipe.scheduler.step = self._spanned("denoise.scheduler", pipe.scheduler.step)
        pipe.vae.decode = self._spanned("vae_decoder", pipe.vae.decode)

    def run(self, call: Mapping[str, Any]) -> tuple[float, Any, Timings]:
        """Return seconds, the picture and the parts' times."""
        self._timings, self._first = Timings(), 0.0
        start = time.perf_counter()
        image = self._pipe(**{**call, "generator": call["generator"]()}).images[0]
        seconds = time.perf_counter() - start
        self._timings.add("denoise", self._last - self._first)
        return seconds, image, self._timings

    def _spanned(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            if name == "denoise.unet" and not self._first:
                self._first = start
            value = function(*arguments, **named)
            now = time.perf_counter()
            if name.startswith("denoise."):
                self._last = now
            self._timings.add(name, now - start)
            return value

        return timed


def _weights(folder: Path) -> int:
    """Return the bytes of the files that a part is read from."""
    return sum(
        file.stat().st_size for file in folder.glob("*") if file.suffix in _WEIGHTS or file.name == "config.json"
    )
