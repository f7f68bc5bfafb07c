"""What a safetensors file says it holds, read without torch: names, shapes, metadata, and which models they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object

__all__ = ["Header", "Part", "Shapes", "checkpoint_file", "find_parts", "is_adapter", "read_header"]

Shapes = Mapping[str, tuple[int, ...]]

LIMIT = 16 * 2**20
"""Largest header, in bytes, that is looked at: that of SDXL with two sets of weights has less than 1 MiB."""

_ADAPTERS = ("lora", ".hada_", ".lokr_", ".diff_b")
_ADDITIONS = ("motion_modules", "ip_adapter")
_SHARE = 0.05
"""Above this share of tensors with an adapter's marks, a file is an adapter, or a model that one still lies beside."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file."""

    shapes: Shapes
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """A submodel in a checkpoint: its class, the prefix of its tensors' names, and whose naming they follow.

    `naming` is "original" (its makers'), "open_clip", "diffusers" (also for CLIP of transformers), or, for text
    encoders of diffusion transformers, "transformers" or "llama.cpp".
    """

    kind: str
    prefix: str
    naming: str

    def strip(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the part's own shapes, by names without the prefix."""
        return {n.removeprefix(self.prefix): s for n, s in shapes.items() if n.startswith(self.prefix)}


def checkpoint_file(source: Source) -> str | None:
    """Return the one safetensors or GGUF file of a source: the source itself, or the only one at a folder's top."""
    top = [path for path in source.files() if "/" not in path]
    found = [path for path in top if PurePosixPath(path).suffix in (".safetensors", ".gguf")]
    return found[0] if len(found) == 1 and not {"config.json", "model_index.json"} & set(top) else None


def read_header(source: Source, path: str) -> Header:
    """Read a header. Raises ModelError if the file is none of its format, cut off, or lies about itself."""
    where = f"{source.name}: {path}" if len(source.files()) > 1 else source.name
    size = source.files()[path]
    length = int.from_bytes(source.read(path, 8), "little")
    if size < 10 or length > size - 8:
        raise ModelError(
            "it is not a safetensors file, or it is cut off",
            where=where,
            hint="It may be an incomplete download: fetch it again.",
        )
    if length > LIMIT:
        raise ModelError(f"its header says to have {length} bytes, more than {LIMIT}", where=where)
    try:
        entries = parse_object(source.read(path, 8 + length)[8:], where, size=LIMIT)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: _shape(entry) for name, entry in entries.items()}
        return Header(shapes, {str(key): str(value) for key, value in metadata.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"its header cannot be read: {error}", where=where, hint="The file is damaged: fetch it again."
        ) from error


def _shape(entry: Any) -> tuple[int, ...]:
    shape = tuple(entry["shape"])
    if not all(type(side) is int and 0 <= side < 2**40 for side in shape):
        raise ValueError(f"a shape of {list(shape)[:8]}")
    return shape


def find_parts(shapes: Shapes) -> dict[str, Part]:
    """Return component -> part for a checkpoint of the Stable Diffusion family, {} for anything else.

    That is a UNet, an autoencoder or a ControlNet, alone or with text encoders; never an adapter or an embedding.
    """
    if is_adapter(shapes):
        return {}
    found = _text_encoders(shapes)
    for component, kind, naming, prefixes, marks in _MODELS:
        for prefix in prefixes:
            if component not in found and all(prefix + mark in shapes for mark in marks):
                found[component] = Part(kind, prefix, naming)
    if (vae := found.get("vae")) and (
        not _latents_of_four(shapes, vae.prefix + "decoder.conv_in.weight") or f"{vae.prefix}bn.running_mean" in shapes
    ):
        del found["vae"]
    models = {"unet", "vae", "controlnet"} & found.keys()
    return found if models else {}


def is_adapter(shapes: Shapes) -> bool:
    """Say whether tensors are those of an adapter, or of what is added to a model, rather than of a whole one."""
    marked = sum(any(mark in name for mark in _ADAPTERS) for name in shapes)
    return marked > _SHARE * len(shapes) or any(mark in name for name in shapes for mark in _ADDITIONS)


_MODELS = (
    (
        "unet",
        "UNet2DConditionModel",
        "original",
        ("model.diffusion_model.", ""),
        ("input_blocks.0.0.weight", "time_embed.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    ),
    (
        "unet",
        "UNet2DConditionModel",
        "diffusers",
        ("",),
        ("conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.conv1.weight"),
    ),
    (
        "vae",
        "AutoencoderKL",
        "original",
        ("first_stage_model.", "vae.", ""),
        ("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
    ),
    (
        "vae",
        "AutoencoderKL",
        "diffusers",
        ("",),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
    ),
    (
        "controlnet",
        "ControlNetModel",
        "original",
        ("control_model.", ""),
        ("input_hint_block.0.weight", "time_embed.0.weight", "zero_convs.0.0.weight"),
    ),
    (
        "controlnet",
        "ControlNetModel",
        "diffusers",
        ("",),
        ("controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight", "controlnet_mid_block.weight"),
    ),
)
"""Component, class, naming, possible prefixes, and names that tell."""


def _latents_of_four(shapes: Shapes, name: str) -> bool:
    """Say whether a decoder takes latents of four channels, as all of the family do; FLUX and video models do not."""
    return len(shapes[name]) == 4 and shapes[name][1] == 4


def _text_encoders(shapes: Shapes) -> dict[str, Part]:
    """Find them by their token embeddings: CLIP's naming or OpenCLIP's, one or two."""
    found: dict[str, Part] = {}
    for component, stem in (
        ("text_encoder", "cond_stage_model."),
        ("text_encoder", "conditioner.embedders.0."),
        ("text_encoder_2", "conditioner.embedders.1."),
    ):
        for level in ("text_model.", ""):
            if f"{stem}transformer.{level}embeddings.token_embedding.weight" in shapes:
                found[component] = Part("CLIPTextModel", f"{stem}transformer.{level}", "diffusers")
                break
        if f"{stem}model.token_embedding.weight" in shapes:
            if stem.startswith("conditioner"):  # also the refiner's only one: it is the second, with a projection
                found["text_encoder_2"] = Part("CLIPTextModelWithProjection", f"{stem}model.", "open_clip")
            else:
                found[component] = Part("CLIPTextModel", f"{stem}model.", "open_clip")
    return found
