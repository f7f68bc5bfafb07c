"""openvino-genai and optimum-intel, as their documentation advises for speed: one size, and compiled models cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Generate", "Wanted", "genai", "optimum"]

Generate = Callable[[int], Any]
"""Makes one picture in a number of steps."""


@dataclass(frozen=True)
class Wanted:
    """A picture that every tool makes; `size` is its side in pixels."""

    prompt: str
    size: int
    guidance: float
    seed: int
    negative: str | None = None


def genai(folder: Path, precision: str, cache: Path, wanted: Wanted) -> Generate:
    """Return openvino-genai's pipeline of a folder; `precision` may be "auto"."""
    import openvino_genai as package

    size = wanted.size
    pipeline = package.Text2ImagePipeline(str(folder))
    pipeline.reshape(1, size, size, wanted.guidance)
    pipeline.compile("CPU", CACHE_DIR=str(cache), **_hint(precision))
    negative = {} if wanted.negative is None else {"negative_prompt": wanted.negative}
    return lambda steps: pipeline.generate(
        wanted.prompt, num_inference_steps=steps, guidance_scale=wanted.guidance, width=size, height=size,
        rng_seed=wanted.seed, **negative,
    ).data[0]  # fmt: skip


def optimum(folder: Path, precision: str, cache: Path, wanted: Wanted, **more: Any) -> Generate:
    """Return the same of optimum-intel; `more` are inputs of a family's own."""
    import torch
    from optimum.intel import OVDiffusionPipeline

    size, options = wanted.size, {"CACHE_DIR": str(cache), **_hint(precision)}
    pipeline = OVDiffusionPipeline.from_pretrained(folder, ov_config=options, compile=False, local_files_only=True)
    pipeline.reshape(batch_size=1, height=size, width=size, num_images_per_prompt=1)
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)
    negative = {} if wanted.negative is None else {"negative_prompt": wanted.negative}
    return lambda steps: pipeline(
        wanted.prompt, num_inference_steps=steps, guidance_scale=wanted.guidance, height=size, width=size,
        generator=torch.Generator("cpu").manual_seed(wanted.seed), **negative, **more,
    ).images[0]  # fmt: skip


def _hint(precision: str) -> dict[str, str]:
    return {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
