"""A diffusers folder: which components it holds, their configs, weights and small files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge.model import Source, read_json
from ovforge_diffusers.tokenization import TOKENIZERS, fits_kind
from ovforge_diffusers.weights import read_weights, weight_files

if TYPE_CHECKING:
    import torch

__all__ = ["INCOMPLETE", "INDEX", "LONE", "Folder", "lone_component"]

INDEX = "model_index.json"
INCOMPLETE = "The folder may be an incomplete download: fetch it again."
LONE = {
    **dict.fromkeys(
        (
            "CLIPTextModel",
            "CLIPTextModelWithProjection",
            "T5EncoderModel",
            "Qwen3Model",
            "Qwen3ForCausalLM",
            "Gemma2Model",
            "Qwen2_5_VLForConditionalGeneration",
        ),
        "text_encoder",
    ),
    "ControlNetModel": "controlnet",
    "SD3ControlNetModel": "controlnet",
    "FluxControlNetModel": "controlnet",
    "QwenImageControlNetModel": "controlnet",
    "SanaControlNetModel": "controlnet",
    "ZImageControlNetModel": "controlnet",
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "transformer",
    "FluxTransformer2DModel": "transformer",
    "Flux2Transformer2DModel": "transformer",
    "ZImageTransformer2DModel": "transformer",
    "SanaTransformer2DModel": "transformer",
    "PixArtTransformer2DModel": "transformer",
    "Lumina2Transformer2DModel": "transformer",
    "QwenImageTransformer2DModel": "transformer",
    "LTXVideoTransformer3DModel": "transformer",
    "AutoencoderKL": "vae",
    "AutoencoderKLFlux2": "vae",
    "AutoencoderDC": "vae",
    "AutoencoderKLQwenImage": "vae",
    "AutoencoderKLLTXVideo": "vae",
    "AutoencoderTiny": "vae",
    "LTXLatentUpsamplerModel": "latent_upsampler",
}
"""Classes of models that come in a folder of their own, and the components that they are."""

_OLD = "Transformer2DModel"
CONTROLNET = "ControlNetModel"
SEVERAL = "MultiControlNetModel"
ASSET_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})
_OF_A_MODEL = ("config.json", "generation_config.json")
"""Small files of a text encoder, which lie beside those of its tokenizer if both are alone."""
# Where a model came from is its owner's business, often a path of their machine.
PRIVATE = frozenset({"_name_or_path"})


class Folder:
    """A pipeline (model_index.json and a folder for each component), or one component alone (config.json).

    A text encoder alone may have its tokenizer beside it, and a tokenizer may be all there is.

    `components` maps their names to their classes; several ControlNets are controlnet, controlnet_1, ...
    """

    misfit = "config.json and weights must come from one model: fetch both again."

    def __init__(self, source: Source, variant: str | None) -> None:
        self.name = source.name
        self.protected = source.protection is not None
        self._source = source
        self._variant = variant
        self.index: dict[str, Any] = {}
        self.alone = INDEX not in source.files()
        if self.alone:
            self.components = _lone(source)
        else:
            index = read_json(source, INDEX)
            self.index = {key: value for key, value in index.items() if key not in PRIVATE}
            self.components = {
                name: self._renamed(name, kind) for name, kind in _components(self.index, source).items()
            }

    def where(self, component: str) -> str:
        """Name a component in messages."""
        return self.name if self.alone else f"{self.name}: {component}"

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config. Raises ModelError if it is missing."""
        path = self._path(component, "config.json")
        if path not in self._source.files():
            raise ModelError(
                f"{path} is missing, and {INDEX} names the component",
                where=self.name,
                hint=f"{INCOMPLETE} If another model has it, name that one by [load.parts], and leave this one out by "
                f"the loader's option skip = [{component!r}].",
            )
        config = read_json(self._source, path)
        return {key: value for key, value in config.items() if key not in PRIVATE}

    def optional(self, component: str, name: str) -> dict[str, Any]:
        """Return another JSON file of a component, {} if it has none."""
        path = self._path(component, name)
        return read_json(self._source, path) if path in self._source.files() else {}

    def weights(self, component: str) -> Callable[[], dict[str, torch.Tensor]]:
        """Find a component's weights now; the function returned reads them."""
        files = self._weight_files(component)
        return lambda: read_weights(self._source, files)

    def tensors(self, component: str, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Read some of a component's weights alone: those of these names that are there."""
        return read_weights(self._source, self._weight_files(component), {name: name for name in names}.get)

    def assets(self, component: str) -> dict[str, bytes]:
        """Return a component's small files, which go along as they are."""
        inside = "" if self.alone else f"{component}/"
        found = {
            f"{component}/{path.removeprefix(inside)}": self._source.read(path)
            for path in self._source.files()
            if path.startswith(inside)
            and PurePosixPath(path).suffix in ASSET_SUFFIXES
            and not (self.alone and ("/" in path or path in _OF_A_MODEL or path.endswith(".index.json")))
        }
        if not found:
            raise ModelError(
                f"the folder {component}/ is missing or empty, {INDEX} names it",
                where=self.name,
                hint=INCOMPLETE,
            )
        return found

    def file(self, path: str) -> bytes | None:
        """Return a small file at the top, None if it is not there."""
        return self._source.read(path) if path in self._source.files() else None

    def _renamed(self, component: str, kind: str) -> str:
        """Return the class of a component."""
        return _today(kind, self.optional(component, "config.json")) if kind == _OLD else kind

    def _weight_files(self, component: str) -> list[str]:
        return weight_files(self._source, "." if self.alone else component, self._variant)

    def _path(self, component: str, name: str) -> str:
        return name if self.alone else f"{component}/{name}"


def lone_component(source: Source) -> bool:
    """Say whether a folder is a component that may stand alone, by what is at its top."""
    try:
        return bool(_lone(source))
    except ModelError:
        return False


def _lone(source: Source) -> dict[str, str]:
    """Return what stands alone in a folder: a model by its config.json, a tokenizer by its tokenizer_config.json."""
    found: dict[str, str] = {}
    if "config.json" in source.files():
        config = read_json(source, "config.json")
        named = config.get("architectures")
        kind = _today(config.get("_class_name", named[0] if isinstance(named, list) and named else None), config)
        if kind in LONE:
            found[LONE[kind]] = kind
    if "tokenizer_config.json" in source.files() and found.keys() <= {"text_encoder"}:
        kind = _tokenizer_class(read_json(source, "tokenizer_config.json"))
        if kind in TOKENIZERS and fits_kind(kind, {path for path in source.files() if "/" not in path}):
            found["tokenizer"] = kind
    return found


def _today(kind: Any, config: dict[str, Any]) -> Any:
    """Return the class of today: PixArt's transformers are published under the name of an older one."""
    old = kind == _OLD and config.get("norm_type", "ada_norm_single") == "ada_norm_single"
    return "PixArtTransformer2DModel" if old else kind


def _tokenizer_class(config: dict[str, Any]) -> str:
    """Return the class that a tokenizer's config names; old ones of CLIP name none, and are known by a token."""
    first = config.get("bos_token")
    first = first.get("content") if isinstance(first, dict) else first
    return str(config.get("tokenizer_class", "CLIPTokenizer" if first == "<|startoftext|>" else None))


def _components(index: dict[str, Any], source: Source) -> dict[str, str]:
    """Return name -> class. What the index lists as several of a kind lies in NAME, NAME_1, NAME_2, ..."""
    found: dict[str, str] = {}
    for name, value in index.items():
        if not isinstance(value, list) or not value:
            continue
        if all(isinstance(each, list) and len(each) == 2 for each in value):
            found |= {_numbered(name, n): str(kind) for n, (_, kind) in enumerate(value)}
        elif len(value) == 2 and value[1] == SEVERAL:
            found[name] = CONTROLNET
            number = 1
            while f"{_numbered(name, number)}/config.json" in source.files():
                found[_numbered(name, number)] = CONTROLNET
                number += 1
        elif len(value) == 2 and value[1] is not None:
            found[name] = str(value[1])
    return found


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
