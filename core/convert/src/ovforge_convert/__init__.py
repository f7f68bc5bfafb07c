"""What loaders share that convert torch modules: weights without pickles, and ov.Models with the same bytes each time.

Torch and its friends are imported inside functions: importing this package is cheap, and a converted model runs
without them.
"""

from __future__ import annotations

from ovforge_convert.modules import (
    Port,
    convert_module,
    convert_tokenizer,
    need,
    pretrained,
    quiet,
    read_pickle,
    read_safetensors,
    settle_names,
)
from ovforge_convert.streaming import SMALL, Rows, Stored, TensorWeight, Weight, streamed_names

__all__ = [
    "SMALL",
    "Port",
    "Rows",
    "Stored",
    "TensorWeight",
    "Weight",
    "convert_module",
    "convert_tokenizer",
    "need",
    "pretrained",
    "quiet",
    "read_pickle",
    "read_safetensors",
    "settle_names",
    "streamed_names",
]
