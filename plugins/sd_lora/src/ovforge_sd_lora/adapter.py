"""An adapter: what a file holds, by role and module. Only the header is read until a delta is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge import open_file
from ovforge.contracts import Skipped
from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_sd_lora import kinds
from ovforge_sd_lora.names import Key, flat, foreign_kind, parse_key
from ovforge_sd_lora.tensors import TensorFile

__all__ = ["Adapter", "Module", "family_name", "open_adapter"]

Array = NDArray[np.float32]

_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL's refiner"}
_SMALL = 64 * 2**10
_KNOWN_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def family_name(width: int) -> str:
    """Return the family whose cross-attention is `width` wide."""
    return _FAMILIES.get(width, f"a model whose cross-attention is {width} wide")


@dataclass(frozen=True)
class Module:
    """What the file says of one module, weight or bias.

    `keys` is tensor -> key in the file. `factor` is what the delta is multiplied by at strength 1: alpha / rank.
    """

    role: str | None
    name: str
    kind: str
    keys: Mapping[str, str]
    shape: tuple[int, ...]
    rank: int | None
    factor: float
    file: TensorFile

    @property
    def dora(self) -> bool:
        """Whether magnitudes are apart."""
        return "magnitude" in self.keys or "dora_scale" in self.keys

    @property
    def label(self) -> str:
        """The kind, as people call it."""
        if self.kind == "bias" or (self.kind == "full" and len(self.shape) == 1):
            return "norm or bias"
        convolution = self.kind == "LoRA" and ("mid" in self.keys or math.prod(self.shape[2:]) > 1)
        name = "LoCon" if convolution else "full difference" if self.kind == "full" else self.kind
        return f"DoRA ({name})" if self.dora else name

    def tensors(self) -> dict[str, Array]:
        """Read the factors, float32."""
        return {name: self.file.read(key) for name, key in self.keys.items()}

    def delta(self) -> Array:
        """Return what is added at strength 1, float32, in `shape`."""
        added = kinds.delta(self.kind, self.tensors())
        return added * np.float32(self.factor) if self.factor != 1 else added


@dataclass(frozen=True)
class Adapter:
    """A whole file. `unknown` are its keys that name no adapter's tensor, or do not belong together."""

    name: str
    where: str
    modules: tuple[Module, ...]
    metadata: Mapping[str, str]
    unknown: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def width(self) -> int | None:
        """Return how wide the cross-attention is that it was trained on, where it has a part there."""
        for module in self.modules:
            if module.role == "unet" and re_cross(module.name) and len(module.shape) > 1:
                return module.shape[1]
        return None


def re_cross(name: str) -> bool:
    """Say whether a module reads the text."""
    return flat(name).endswith(("attn2_to_k", "attn2_to_v"))


def open_adapter(path: Path, name: str) -> Adapter:
    """Open an adapter file or folder. Raises ModelError where it is none, or is damaged."""
    source = open_file(path)
    file = _adapter_file(source)
    tensors = TensorFile(source, file)
    config = _peft_config(source, file, tensors.metadata)
    groups: dict[tuple[str | None, str], dict[str, str]] = {}
    unknown: list[Skipped] = []
    for key in tensors.tensors:
        parsed = parse_key(key)
        if parsed is None:
            kind = foreign_kind(key)
            unknown.append(Skipped(key, f"the kind {kind!r} is not supported" if kind else "no adapter's tensor"))
        else:
            _group(groups, parsed, key)
    modules: list[Module] = []
    alphas = False
    for (role, module), keys in groups.items():
        alphas = alphas or "alpha" in keys
        try:
            modules += _modules(role, module, keys, tensors, config)
        except kinds.Misshapen as error:
            unknown.append(Skipped(module, str(error)))
    if not modules:
        reason = f": {unknown[0].item}: {unknown[0].reason}" if unknown else ""
        raise ModelError(
            f"it holds no adapter{reason}", where=tensors.where, hint="It may be a whole model, or an embedding."
        )
    notes = () if alphas or config else ("the file names no alpha, so that it counts as the rank",)
    return Adapter(name, tensors.where, tuple(modules), tensors.metadata, tuple(unknown), notes)


def _group(groups: dict[tuple[str | None, str], dict[str, str]], parsed: Key, key: str) -> None:
    groups.setdefault((parsed.role, parsed.module), {})[parsed.tensor] = key


def _adapter_file(source: Source) -> str:
    """Return the one file of a source that holds tensors."""
    files = source.files()
    found = [path for path in files if path.endswith(".safetensors")]
    found = [path for path in _KNOWN_NAMES if path in found] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"it holds several files: {', '.join(sorted(found)[:5])}", where=source.name, hint="Name one of them."
        )
    pickles = [path for path in files if PurePosixPath(path).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    raise ModelError(
        f"{pickles[0]} is a pickle, which can run code, and is not opened" if pickles else "no .safetensors file",
        where=source.name,
        hint="Get the adapter as .safetensors, or convert it where you trust it.",
    )


@dataclass(frozen=True)
class _Config:
    """alpha and rank as PEFT's config names them, for modules whose file has no alpha of their own."""

    alpha: float
    rank: int
    alphas: Mapping[str, float]
    rooted: bool

    def factor(self, module: str, rank: int | None) -> float:
        """Return alpha / rank of a module; the config's own rank where the factors have none, as PEFT divides it."""
        rank = rank or self.rank
        alpha = next((a for pattern, a in self.alphas.items() if module.endswith(pattern)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def _peft_config(source: Source, file: str, metadata: Mapping[str, str]) -> dict[str, _Config]:
    """Return prefix of roles -> config: from a folder's adapter_config.json, or diffusers' metadata in the file."""
    beside = str(PurePosixPath(file).parent / "adapter_config.json")
    where, text = f"{source.name}: {beside}", ""
    if beside in source.files() and source.files()[beside] <= _SMALL:
        text = source.read(beside).decode("utf-8", "replace")
    elif "lora_adapter_metadata" in metadata:
        where, text = f"{source.name}: lora_adapter_metadata", metadata["lora_adapter_metadata"]
    if not text:
        return {}
    try:
        value = parse_object(text, where)
        roles = {""}
        if any("." in key for key in value):
            roles = {key.partition(".")[0] for key in value}
        return {
            role: _config({key.removeprefix(f"{role}."): item for key, item in value.items() if key.startswith(role)})
            for role in roles
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ModelError(
            f"not a PEFT config: {error}", where=where, hint="Give the .safetensors file alone."
        ) from error


def _config(value: Mapping[str, Any]) -> _Config:
    rank = int(value.get("r", 1))
    alphas = {str(key): float(alpha) for key, alpha in (value.get("alpha_pattern") or {}).items()}
    alpha = float(value.get("lora_alpha", value.get("alpha", rank)))
    if not all(map(math.isfinite, (alpha, *alphas.values()))):
        raise ValueError("an alpha is not finite")
    return _Config(alpha, rank, alphas, bool(value.get("use_rslora")))


def _modules(
    role: str | None, name: str, keys: dict[str, str], file: TensorFile, config: Mapping[str, _Config]
) -> list[Module]:
    """Return a module's weight and bias. Raises Misshapen where the tensors do not belong together."""
    shapes = {tensor: file.tensors[key].shape for tensor, key in keys.items()}
    made = []
    bias = {"diff_b": keys.pop(b)} if (b := "diff_b" if "diff_b" in keys else "up_bias") in keys else {}
    if set(keys) - {"alpha"}:
        kind = kinds.kind_of(set(keys))
        unused = set(keys) - {*kinds.FACTORS[kind][0], *kinds.FACTORS[kind][1], "alpha", "magnitude", "dora_scale"}
        if unused:
            raise kinds.Misshapen(f"{', '.join(sorted(unused))} does not belong to a {kind}")
        shape, rank = kinds.delta_shape(kind, shapes), kinds.rank_of(kind, shapes)
        if 0 in shape or rank == 0:
            raise kinds.Misshapen(f"it is empty: {list(shape)}, rank {rank}")
        factor = _factor(role, name, kind, keys, rank, file, config)
        parts = {tensor: key for tensor, key in keys.items() if tensor != "alpha"}
        made.append(Module(role, name, kind, parts, shape, rank, factor, file))
    if bias:
        # A bias that PEFT trains beside the factors is scaled with them; a difference is what it is.
        factor = made[0].factor if b == "up_bias" and made else 1.0
        made.append(Module(role, name, "bias", bias, shapes[b], None, factor, file))
    if not made:
        raise kinds.Misshapen("alpha alone changes nothing")
    return made


def _factor(
    role: str | None,
    name: str,
    kind: str,
    keys: Mapping[str, str],
    rank: int | None,
    file: TensorFile,
    config: Mapping[str, Any],
) -> float:
    """Return alpha / rank: alpha from the file, else from the config, else the rank itself."""
    found = config.get(role or "") or config.get("")
    if rank is None and not (kind == "LoKr" and found):
        return 1.0
    if "alpha" in keys and rank:
        alpha = file.read(keys["alpha"])
        if alpha.size != 1:
            raise kinds.Misshapen(f"alpha is {list(alpha.shape)}, not one number")
        return float(alpha.reshape(())) / rank
    return float(found.factor(name, rank)) if found else 1.0
