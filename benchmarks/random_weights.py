"""Models of full size with random weights, written to disk without ever being held."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_random"]

_CHUNK = 2**24
"""Values that are drawn at once."""


def write_random(folder: Path, kind: Any, config: dict[str, Any], seed: int = 0) -> int:
    """Write a component's folder of diffusers, in bfloat16: `kind` is its class, `config` what that takes.

    Vectors that scale are 1, biases 0, and all others are drawn with a deviation of 0.02. Returns the number of
    parameters.
    """
    import torch

    with torch.device("meta"):
        module = kind(**config)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in module.config.items() if not name.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **own}))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(seed)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            left = math.prod(shape)
            while left:
                count = min(left, _CHUNK)
                file.write(_drawn(name, shape, count, rng))
                left -= count
    return sum(map(math.prod, shapes.values()))


def _drawn(name: str, shape: tuple[int, ...], count: int, rng: np.random.Generator) -> bytes:
    """Return values in bfloat16, which is the upper half of float32."""
    if len(shape) == 1:
        values = np.full(count, 0 if name.endswith("bias") else 1, np.float32)
    else:
        values = rng.standard_normal(count, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
