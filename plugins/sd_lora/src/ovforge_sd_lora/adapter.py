"""An adapter: what a file holds, by role and module. Only the header is read until a delta is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge import open_file
from ovforge.contracts import Skipped
from ovforge.errors import ConfigError, ModelError
from ovforge.model import Source
from ovforge_sd_lora import kinds
from ovforge_sd_lora.config import PeftConfig, config_of, read_configs
from ovforge_sd_lora.families import Family, foreign_family
from ovforge_sd_lora.names import Key, flat, foreign_kind, parse_key, word_of
from ovforge_sd_lora.relative import RELATIVE, relative_kind
from ovforge_sd_lora.tensors import TensorFile

__all__ = ["Adapter", "Module", "family_name", "open_adapter"]

Array = NDArray[np.float32]

_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL's refiner"}
_KNOWN_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B")
"""Tensors that PEFT writes once for all layers."""


def family_name(width: int) -> str:
    """Return the family whose cross-attention is `width` wide."""
    return _FAMILIES.get(width, f"a model whose cross-attention is {width} wide")


@dataclass(frozen=True)
class Module:
    """What the file says of one module, weight or bias.

    `keys` is tensor -> key in the file; `shape` that of what is added, () if the layer's own shape decides.
    `factor` is what the delta is multiplied by at strength 1: alpha / rank. `start` says how training changed the base
    for its start ("pissa", "olora"), which is made up for; `settings` is what PEFT's config says of the kind.
    `rows` are the (begin, end) of its rows that a layer takes, of which the file has several in one; () for all.
    `beyond` is how many inputs the layer has behind those of the file, which a linear LoRA leaves alone.
    """

    role: str | None
    name: str
    kind: str
    keys: Mapping[str, str]
    shape: tuple[int, ...]
    rank: int | None
    factor: float
    file: TensorFile
    on_bias: bool = False
    start: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[tuple[int, int], ...] = ()
    beyond: int = 0

    @property
    def dora(self) -> bool:
        """Whether magnitudes are apart."""
        return "magnitude" in self.keys or "dora_scale" in self.keys

    @property
    def by_input(self) -> bool:
        """Whether DoRA's magnitudes are inputs': LyCORIS stores those as (1, in), and those of outputs as (out, 1)."""
        if "dora_scale" not in self.keys:
            return False
        shape = self.file.tensors[self.keys["dora_scale"]].shape
        return len(shape) > 1 and shape[0] == 1 and shape[1] != 1

    def own(self, value: Array) -> Array:
        """Return the rows of an array of the file's whole layer that are this module's."""
        if not self.rows:
            return value
        taken = [value[begin:end] for begin, end in self.rows]
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    @property
    def relative(self) -> bool:
        """Whether the layer's own weight has a part in what is added."""
        return self.dora or bool(self.start) or self.kind in RELATIVE

    def strength(self, scale: float) -> float:
        """Return how far it goes at a scale: norms of a Control LoRA take the place of the model's, or do not."""
        whole = self.kind in RELATIVE and RELATIVE[self.kind].whole
        return float(scale != 0) if whole else scale

    @property
    def label(self) -> str:
        """The kind, as people call it."""
        if self.kind in RELATIVE:
            return f"{self.kind}, bias" if self.on_bias else self.kind
        if self.on_bias or (self.kind == "full" and len(self.shape) == 1):
            return "norm or bias"
        convolution = self.kind == "LoRA" and ("mid" in self.keys or math.prod(self.shape[2:]) > 1)
        name = "LoCon" if convolution else "full difference" if self.kind == "full" else self.kind
        name = {"pissa": "PiSSA", "olora": "OLoRA"}.get(self.start, name)
        return f"DoRA ({name})" if self.dora else name

    def tensors(self) -> dict[str, Array]:
        """Read the factors, float32."""
        found = {name: self.file.read(key) for name, key in self.keys.items()}
        if self.beyond:
            found["down"] = np.pad(found["down"], ((0, 0), (0, self.beyond)))
        return found

    def delta(self) -> Array:
        """Return what is added at strength 1, float32, in `shape`; of kinds that need no weight for it."""
        added = self.own(kinds.delta(self.kind, self.tensors()))
        return added * np.float32(self.factor) if self.factor != 1 else added

    def misfit(self, weight: tuple[int, ...]) -> str:
        """Return why a relative kind does not fit a layer whose weight has this shape; "" if it does."""
        shapes = {tensor: self.file.tensors[key].shape for tensor, key in self.keys.items()}
        try:
            RELATIVE[self.kind].check(shapes, weight, self.settings)
        except kinds.Misshapen as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Adapter:
    """A whole file. `unknown` are its keys that name no adapter's tensor, or do not belong together.

    `family` is the family that it is for, unless that is Stable Diffusion's; `words` are those whose embeddings the
    file brings along; `names` are those of the adapters in it, where PEFT has named them.
    """

    name: str
    where: str
    modules: tuple[Module, ...]
    metadata: Mapping[str, str]
    unknown: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = field(default=())
    family: Family | None = None
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def width(self) -> int | None:
        """Return how wide the cross-attention is that it was trained on, where it has a part there."""
        for module in self.modules:
            if (
                module.role in (None, "unet")
                and self.family is None
                and re_cross(module.name)
                and len(module.shape) > 1
            ):
                return module.shape[1]
        return None


def re_cross(name: str) -> bool:
    """Say whether a module reads the text."""
    return flat(name).endswith(("attn2_to_k", "attn2_to_v"))


def open_adapter(path: Path, name: str, adapter: str | None = None) -> Adapter:
    """Open an adapter file or folder; `adapter` chooses one of several that PEFT has named in one file.

    Raises ModelError if it is not an adapter, or is damaged; ConfigError for a name that is not there.
    """
    source = open_file(path)
    file = _adapter_file(source)
    tensors = TensorFile(source, file)
    configs = read_configs(source, file, tensors.metadata)
    parsed, unknown = _parse_keys(tensors, configs)
    names = tuple(sorted({key.adapter for key in parsed.values() if key.adapter}))
    _check_names(names, adapter, tensors.where)
    chosen = {key: found for key, found in parsed.items() if found.adapter in (None, adapter or (*names, None)[0])}
    modules: list[Module] = []
    alphas = False
    for first, keys in _grouped(chosen, unknown):
        alphas = alphas or "alpha" in keys
        try:
            modules += _modules(first, keys, tensors, configs)
        except kinds.Misshapen as error:
            unknown.append(Skipped(first.module or "all layers", str(error)))
        except (ValueError, OverflowError, TypeError) as error:
            raise ModelError(
                f"not a PEFT config: {error}", where=tensors.where, hint="Give the .safetensors file alone."
            ) from error
    words = tuple(dict.fromkeys(word for key in tensors.tensors if (word := word_of(key)) is not None))
    if not modules:
        raise _empty(tensors, unknown, words)
    ranked = any(module.kind in ("LoRA", "LoHa", "LoKr") for module in modules)
    notes = ["the file names no alpha, so that it counts as the rank"] if ranked and not (alphas or configs) else []
    if words:
        notes.append(
            f"the file also brings the words {', '.join(words)}: to use them, add a transform "
            f'"textual-inversion" with the same path'
        )
    named = [module.name for module in modules if module.role in (None, "unet", "transformer")]
    family = foreign_family([*named, *(skipped.item for skipped in unknown)])
    modules, double = _without_doubles(modules)
    if double:
        notes.append(f"{len(double)} fused layers ({double[0]}) are in the file in parts, too, which count")
    if family is not None and family.fits:  # kohya's and ComfyUI's prefixes are the same for UNets
        modules = [replace(each, role="transformer") if each.role in (None, "unet") else each for each in modules]
    return Adapter(
        name, tensors.where, tuple(modules), tensors.metadata, tuple(unknown), tuple(notes), family, words, names
    )


def _without_doubles(modules: list[Module]) -> tuple[list[Module], list[str]]:
    """Leave out what some trainers of Z-Image write twice; return the names of that, too. Source: diffusers' reader.

    Beside `attention.to.q.lora.down` and its kin stands the same as `attention.qkv.lora.down`; likewise the output.
    """
    known = {flat(module.name) for module in modules}
    parts = {"_attention_qkv": "_attention_to_q", "_attention_out": "_attention_to_out_0"}

    def double(module: Module) -> bool:
        name, dotted = flat(module.name), module.keys.get("down", "").endswith(".lora.down.weight")
        return dotted and any(
            name.endswith(end) and name.removesuffix(end) + part in known for end, part in parts.items()
        )

    return [each for each in modules if not double(each)], [each.name for each in modules if double(each)]


def _parse_keys(tensors: TensorFile, configs: Mapping[str, PeftConfig]) -> tuple[dict[str, Key], list[Skipped]]:
    """Return what each key means, and those that mean nothing here."""
    scaled = {key.removesuffix(".on_input") for key in tensors.tensors if key.endswith(".on_input")}
    whole = any(config.replaces or config.kind == "LN_TUNING" for config in configs.values())
    parsed: dict[str, Key] = {}
    unknown: list[Skipped] = []
    for key in tensors.tensors:
        if word_of(key) is not None:
            continue
        found = parse_key(key, scales=key.removesuffix(".weight") in scaled, whole=whole)
        if found is not None:
            parsed[key] = found
            continue
        kind = foreign_kind(key)
        unknown.append(Skipped(key, f"the kind {kind!r} is not supported" if kind else "no adapter's tensor"))
    return parsed, unknown


def _check_names(names: tuple[str, ...], chosen: str | None, where: str) -> None:
    listed = ", ".join(names)
    if chosen is not None and chosen not in names:
        raise ConfigError(
            f"the file has no adapter {chosen!r}",
            where=f"{where}: adapter",
            hint=f"It has: {listed}." if names else "Its tensors name none: leave the option out.",
        )
    if chosen is None and len(names) > 1:
        raise ModelError(
            f"it holds several adapters: {listed}",
            where=where,
            hint=f'Choose one with the option adapter = "{names[0]}"; for several, use the transform several times.',
        )


def _grouped(parsed: Mapping[str, Key], unknown: list[Skipped]) -> Iterable[tuple[Key, dict[str, str]]]:
    """Return (one of its keys, tensor -> key) of each module; what layers share is given to each of them.

    A module under two prefixes is two: they add up. Two keys for one tensor under the same are refused.
    """
    groups: dict[tuple[str | None, str, str], tuple[Key, dict[str, str]]] = {}
    shared: dict[str, str] = {}
    for key, found in parsed.items():
        if not found.module and found.tensor in _SHARED:
            shared[found.tensor] = key
            continue
        _, keys = groups.setdefault((found.role, found.module, found.prefixes), (found, {}))
        if found.tensor in keys:
            unknown.append(Skipped(key, f"it is the same tensor as {keys[found.tensor]}"))
        else:
            keys[found.tensor] = key
    for first, keys in groups.values():
        for tensor, key in shared.items():
            if f"{tensor.partition('_')[0]}_lambda" in keys or f"{tensor.partition('_')[0]}_lambda_b" in keys:
                keys.setdefault(tensor, key)
        yield first, keys


def _empty(tensors: TensorFile, unknown: list[Skipped], words: tuple[str, ...]) -> ModelError:
    if words:
        return ModelError(
            f"it holds no adapter, but the words {', '.join(words)}",
            where=tensors.where,
            hint='Use the transform "textual-inversion".',
        )
    reason = f": {unknown[0].item}: {unknown[0].reason}" if unknown else ""
    return ModelError(
        f"it holds no adapter{reason}", where=tensors.where, hint="It may be a whole model, or an embedding."
    )


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


def _modules(key: Key, keys: dict[str, str], file: TensorFile, configs: Mapping[str, PeftConfig]) -> list[Module]:
    """Return a module's weight and bias. Raises Misshapen if the tensors do not belong together."""
    config = config_of(configs, key.role)
    shapes = {tensor: file.tensors[name].shape for tensor, name in keys.items()}
    made: list[Module] = []
    whole: dict[str, str] = {tensor: keys.pop(tensor) for tensor in ("new", "new_b") if tensor in keys}
    if whole:
        made = _relative_modules(key, "replaced", whole, shapes, file, config)
        if not keys:
            return made
    kind = relative_kind(set(keys))
    if kind is not None:
        return made + _relative_modules(key, kind, keys, shapes, file, config)
    bias = {"diff_b": keys.pop(b)} if (b := "diff_b" if "diff_b" in keys else "up_bias") in keys else {}
    if set(keys) - {"alpha"}:
        kind = kinds.kind_of(set(keys))
        unused = set(keys) - {*kinds.FACTORS[kind][0], *kinds.FACTORS[kind][1], "alpha", "magnitude", "dora_scale"}
        if unused:
            raise kinds.Misshapen(f"{', '.join(sorted(unused))} does not belong to a {kind}")
        if kind == "AdaLoRA" and shapes["singular"][:1] == (0,):
            return []  # its training has pruned all ranks of this layer
        shape, rank = kinds.delta_shape(kind, shapes), kinds.rank_of(kind, shapes)
        if 0 in shape or rank == 0:
            raise kinds.Misshapen(f"it is empty: {list(shape)}, rank {rank}")
        start = config.start if config and kind == "LoRA" else ""
        if start and len(shape) != 2:
            raise kinds.Misshapen(f"{start} is for linear layers")
        factor = _factor(key.module, kind, keys, rank, file, config)
        parts = {tensor: name for tensor, name in keys.items() if tensor != "alpha"}
        made.insert(0, Module(key.role, key.module, kind, parts, shape, rank, factor, file, start=start))
    if bias:
        # A bias that PEFT trains beside the factors is scaled with them; a difference is what it is.
        factor = made[0].factor if b == "up_bias" and made else 1.0
        made.append(Module(key.role, key.module, "bias", bias, shapes[b], None, factor, file, on_bias=True))
    if not made:
        raise kinds.Misshapen("alpha alone changes nothing")
    return made


def _relative_modules(
    key: Key,
    name: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    file: TensorFile,
    config: PeftConfig | None,
) -> list[Module]:
    """Return the modules, weight and bias, of a kind that the layer's own weight has a part in."""
    kind = RELATIVE[name]
    if name != "SHiRA" and any(0 in shape for tensor, shape in shapes.items()):
        raise kinds.Misshapen("it is empty")
    settings = kind.settings_of(config, key.module, set(keys))
    rank = kind.rank(shapes) if kind.rank and all(shapes[tensor] for tensor in kind.needed) else None
    whole = Module(key.role, key.module, name, keys, (), rank, 1.0, file, settings=settings)
    parts = [whole] if kind.on_weight(set(keys)) else []
    return [*parts, replace(whole, on_bias=True)] if kind.on_bias(set(keys)) else parts


def _factor(
    module: str,
    kind: str,
    keys: Mapping[str, str],
    rank: int | None,
    file: TensorFile,
    config: PeftConfig | None,
) -> float:
    """Return alpha / rank: alpha from the file, else from the config, else the rank itself.

    LoKr without factors has no rank in the file: LyCORIS then leaves alpha out, PEFT divides by its config's rank.
    """
    if kind == "AdaLoRA" and config is None:
        raise kinds.Misshapen("adapter_config.json, which holds its alpha, is not there: give the folder")
    if rank is None and not (kind == "LoKr" and config):
        return 1.0
    if "alpha" in keys and rank:
        alpha = file.read(keys["alpha"])
        if alpha.size != 1:
            raise kinds.Misshapen(f"alpha is {list(alpha.shape)}, not one number")
        return float(alpha.reshape(())) / rank
    return config.factor(module, rank) if config else 1.0
