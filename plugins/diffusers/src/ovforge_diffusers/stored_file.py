"""A safetensors or GGUF file: what it says it holds, and its tensors, read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ovforge.model import Source
from ovforge_diffusers.components import is_gguf, read_contents
from ovforge_diffusers.gguf_file import read_gguf_header
from ovforge_diffusers.requirements import need
from ovforge_diffusers.stored import check_layers, dequantized, read_gguf, read_scaled
from ovforge_diffusers.weights import check_file, read_weights

if TYPE_CHECKING:
    import torch

    from ovforge_convert import Weight
    from ovforge_diffusers.transformer_names import Slice

__all__ = ["StoredFile"]


class StoredFile:
    """One file of a source. Methods take the names of tensors in the file -> the names that they are to have.

    Raises ModelError for a file that is damaged, or whose layers are stored in a form that is not read.
    """

    def __init__(self, source: Source, path: str) -> None:
        self.source, self.path = source, path
        self._is_gguf = is_gguf(path)
        if not self._is_gguf:
            check_file(source, path)
        contents = read_contents(source, path)
        self.shapes = contents.shapes
        """Name -> shape of each tensor."""
        self.metadata: Mapping[str, Any] = contents.metadata if self._is_gguf else {}
        """What a GGUF file says of its model; {} for others."""
        self._forms = {} if self._is_gguf else check_layers(source, path, contents)

    def weights(self, names: Mapping[str, str]) -> dict[str, Weight]:
        """Return tensors as weights, compressed ones as they are stored, float8 with their scales."""
        if self._is_gguf:
            return read_gguf(self.source, self.path, names)
        return read_scaled(self.source, self.path, names, self._forms)

    def tensors(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Return tensors of torch; those of a GGUF file in float32."""
        if not self._is_gguf:
            return read_weights(self.source, [self.path], names.get)
        torch = need("torch", "converting a checkpoint")
        found = {}
        for name, weight in read_gguf(self.source, self.path, names).items():
            found[name] = torch.empty(weight.shape, dtype=torch.float32)
            weight.fill(found[name].numpy())
        return found

    def dequantized(self, names: Mapping[str, str], rows: Mapping[str, list[Slice]] | None) -> dict[str, list[str]]:
        """Return type -> names, of quantized tensors that do not stay so when `rows` puts them together."""
        if not self._is_gguf:
            return {}
        entries = read_gguf_header(self.source, self.path).tensors
        return dequantized({new: entries[name] for name, new in names.items()}, rows)
