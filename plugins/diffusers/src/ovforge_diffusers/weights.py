"""Torch weights from safetensors, checked to be all there. Pickles are never opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ovforge.errors import ModelError, did_you_mean
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_convert import TensorWeight, Weight, streamed_names
from ovforge_diffusers.requirements import need

if TYPE_CHECKING:
    import torch

__all__ = ["STATISTICS", "check_file", "fill_weights", "latent_statistics", "read_weights", "weight_files"]

_INDEX = re.compile(r"\.safetensors\.index(?:\.(.+))?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_LANGUAGE = re.compile(r"^model\.(?!language_model\.|visual\.)")
_VISION = re.compile(r"^visual\.")
STATISTICS = {
    "AutoencoderKLFlux2": ("bn.running_mean", "bn.running_var"),
    "AutoencoderKLLTXVideo": ("latents_mean", "latents_std"),
}
"""Class of an autoencoder -> those of its weights that are the statistics of its latents: FLUX.2's are folded ones."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def weight_files(source: Source, component: str, variant: str | None) -> list[str]:
    """Return the safetensors files of a component: one, or the shards that its index names.

    `component` is its folder, "." for the source itself. A file is NAME.safetensors or NAME.VARIANT.safetensors.
    Without `variant` the plain one is taken, or the only variant that there is. Raises ModelError if there is none,
    or no telling which.
    """
    names = [path for path in source.files() if PurePosixPath(path).parent.as_posix() == component]
    found: dict[str, list[str]] = {}
    for path in names:
        if index := _INDEX.search(path):
            found[index[1] or ""] = _shards(source, path)
    for path in names:
        if path.endswith(".safetensors") and not _SHARD.search(path):
            plain = PurePosixPath(path.removesuffix(".safetensors"))
            found.setdefault(plain.suffix.removeprefix("."), [path])
    if variant is None and "" not in found and len(found) == 1:
        return next(iter(found.values()))
    if (variant or "") in found:
        return found[variant or ""]
    subject = "it" if component == "." else component
    if found:
        choices = ", ".join(repr(name) for name in sorted(found) if name) or "none"
        raise ModelError(
            f"{subject} has no weights {f'of the variant {variant!r}' if variant else 'without a variant'}",
            where=source.name,
            hint=f"Set the loader's option variant to one of: {choices}.{did_you_mean(variant or '', found)}",
        )
    if pickled := next((path for path in names if path.endswith(_PICKLES)), None):
        raise ModelError(
            f"{pickled} is a pickle, which can run code when it is opened",
            where=source.name,
            hint="Convert it where you trust it: DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False)"
            ".save_pretrained(OTHER_FOLDER), then open OTHER_FOLDER.",
        )
    raise ModelError(
        f"{subject} has no weights: a file like {PurePosixPath(component) / '*.safetensors'} is missing",
        where=source.name,
        hint="The folder may be an incomplete download: fetch it again.",
    )


def _shards(source: Source, index: str) -> list[str]:
    try:
        names = set(parse_object(source.read(index), f"{source.name}: {index}")["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("no valid index of weights", where=f"{source.name}: {index}") from error
    shards = [(PurePosixPath(index).parent / name).as_posix() for name in sorted(map(str, names))]
    if missing := [shard for shard in shards if shard not in source.files()]:
        raise ModelError(
            f"{', '.join(missing)} is missing, {index} names it",
            where=source.name,
            hint="The folder may be an incomplete download: fetch it again.",
        )
    return shards


def read_weights(
    source: Source, files: list[str], rename: Callable[[str], str | None] | None = None
) -> dict[str, torch.Tensor]:
    """Return name -> tensor, of those that `rename` gives a name. Others are not read.

    Tensors keep their type, and those of plain files stay mapped, not copied. Raises ModelError for a damaged file,
    and for weights that are not numbers.
    """
    weights: dict[str, Any] = {}
    for path in files:
        for stored, tensor in _tensors(source, path, rename):
            name = rename(stored) if rename else stored
            if name is not None:
                weights[name] = tensor
                _check_finite(tensor, stored, source, path)
    return weights


def _tensors(source: Source, path: str, rename: Callable[[str], str | None] | None) -> Iterator[tuple[str, Any]]:
    """Yield a file's tensors: one after the other where it can be mapped into memory, else all at once."""
    safetensors = need("safetensors", "converting a diffusers folder")
    local = source.local(path)
    try:
        if local is None:
            yield from need("safetensors.torch", "converting a diffusers folder").load(source.read(path)).items()
            return
        with safetensors.safe_open(local, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a mapping
                if rename is None or rename(name) is not None:
                    yield name, file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(source, path, error) from error


def check_file(source: Source, path: str) -> None:
    """Raise ModelError for a safetensors file whose header does not fit its size, before anything is read."""
    safetensors = need("safetensors", "converting a diffusers folder")
    if (local := source.local(path)) is not None:
        try:
            with safetensors.safe_open(local, framework="np"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(source, path, error) from error


def _damaged(source: Source, path: str, error: Exception) -> ModelError:
    return ModelError(
        f"{path} cannot be read: {error}",
        where=source.name,
        hint="The file is cut off or damaged: fetch it again.",
    )


def _check_finite(tensor: torch.Tensor, name: str, source: Source, path: str) -> None:
    """Refuse NaN and infinity. The ends of a tensor's range are enough to see them, and need no memory."""
    torch = need("torch", "converting a diffusers folder")
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.element_size() == 1:  # float8, of which torch knows no more than how to convert it
        tensor = tensor.to(torch.float16)
    if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        raise ModelError(
            f"{name} holds NaN or infinity",
            where=f"{source.name}: {path}" if len(source.files()) > 1 else source.name,
            hint="The model is damaged, or was saved in too low a precision: fetch it again, in float32 or bfloat16.",
        )


def latent_statistics(kind: str, weights: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the statistics of latents as optimum-intel writes them into the decoder's config.json.

    They belong to neither encoder nor decoder; FLUX.2's are the running ones of its batch normalization. Raises
    ModelError if the weights have none.
    """
    found: dict[str, Any] = {}
    for name in STATISTICS[kind]:
        if (tensor := weights.get(name)) is None:
            raise ModelError(
                f"the weights do not fit the config: {name} is missing",
                where=where,
                hint="The folder may be an incomplete download: fetch it again.",
            )
        found[f"{name.replace('.', '_')}_data"] = _whole(
            tensor, need("torch", "converting a diffusers folder").empty(0)
        ).tolist()
    return {**found, "bn_eps": float(config.get("batch_norm_eps", 1e-4))} if kind == "AutoencoderKLFlux2" else found


def fill_weights(model: Any, weights: Mapping[str, Any], where: str, hint: str) -> dict[str, Weight]:
    """Give a module its weights: each of them, in its own shape, and nothing left over.

    Names that older versions of diffusers and transformers wrote are understood. Large matrices are not put into the
    module, but returned by name, for the converter to read one after the other. Raises ModelError otherwise.
    """
    torch = need("torch", "converting a diffusers folder")
    expected = model.state_dict()
    weights = _today(model, expected, weights)
    problems = _differences(expected, weights)
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"the weights do not fit the config: {'; '.join(problems[:3])}{more}",
            where=where,
            hint=hint,
        )
    given = {name: TensorWeight(w) if isinstance(w, torch.Tensor) else w for name, w in weights.items()}
    streamed = streamed_names(model)
    own = {name: _whole(weights[name], expected[name]) for name in expected if name not in streamed}
    model.load_state_dict(own, strict=False, assign=True)
    return {name: given[name] for name in streamed}


def _whole(weight: Any, want: torch.Tensor) -> torch.Tensor:
    """Return a weight as a tensor, of float32 if it is of floats."""
    torch = need("torch", "converting a diffusers folder")
    if isinstance(weight, torch.Tensor):
        return weight.to(torch.float32) if want.is_floating_point() else weight
    values = np.empty(weight.shape, np.float32)
    weight.fill(values)
    return torch.from_numpy(values)


def _differences(expected: Mapping[str, torch.Tensor], weights: Mapping[str, Any]) -> list[str]:
    torch = need("torch", "converting a diffusers folder")
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} belongs nowhere" for name in weights if name not in expected]
    for name, weight in weights.items():
        want = expected.get(name)
        if want is None:
            continue
        if tuple(want.shape) != tuple(weight.shape):
            problems.append(f"{name} is {list(weight.shape)}, not {list(want.shape)}")
        elif want.is_floating_point() and isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            problems.append(f"{name} is {weight.dtype}, not a float type")
    return problems


def _today(model: Any, expected: Mapping[str, torch.Tensor], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights under the names that the installed versions use."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    # transformers before 4.52, and what later versions write, have no level `language_model.` in Qwen2.5-VL.
    if "model.language_model.embed_tokens.weight" in expected:
        weights = {
            _VISION.sub("model.visual.", _LANGUAGE.sub("model.language_model.", name)): tensor
            for name, tensor in weights.items()
        }
    # Tied weights are stored once: T5's words, under one name or the other.
    for name, other in (getattr(model, "_tied_weights_keys", None) or {}).items():
        for one, two in ((name, other), (other, name)):
            if one in expected and one not in weights and two in weights:
                weights[one] = weights[two]
    # transformers 5.6 took the level `text_model.` out of CLIPTextModel; every older checkpoint has it.
    if "embeddings.token_embedding.weight" in expected:
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    # Z-Image's Qwen3 is stored as the language model that it was taken from.
    if "embed_tokens.weight" in expected:
        own = (item for item in weights.items() if item[0] != "lm_head.weight" or item[0] in expected)
        weights = {name.removeprefix("model."): tensor for name, tensor in own}
    framed = type(model).__name__ == "AutoencoderKLQwenImage"
    # diffusers before 0.17 called an autoencoder's attention query, key, value, proj_attn, some of it 1x1 convolutions.
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(weights)
    for name, tensor in weights.items():
        want = expected.get(name)
        if want is not None and want.ndim == 2 and tuple(tensor.shape) == (*want.shape, 1, 1):
            weights[name] = tensor[:, :, 0, 0]
        # Of a causal convolution over frames, a picture needs the last slice: see `qwenimage_vae`.
        if framed and want is not None and want.ndim == 4 and len(tensor.shape) == 5:
            weights[name] = tensor[:, :, -1]
    return weights
