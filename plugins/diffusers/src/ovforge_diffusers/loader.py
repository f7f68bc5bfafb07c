"""The loader: a diffusers folder to ov.Models, role by role.

Names of tensors and folders are those that optimum-intel exports, so that its tools and openvino-genai open what is
written here. Each role is converted when it is first asked for, and PyTorch's copy is dropped at once: memory stays near one
submodel.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ovforge.bundle import ModelBundle
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.sources import Source
from ovforge.stages import Match
from pydantic import BaseModel, ConfigDict, Field

from ovforge_diffusers.needs import need

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["DiffusersLoader", "DiffusersOptions"]

_TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_VAE_FACTOR = 8
"""Pixels for each latent of Stable Diffusion's autoencoders, by which a fixed picture size fixes the UNet's."""

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


class DiffusersOptions(BaseModel):
    """How to convert. Without sizes, shapes stay dynamic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["f16", "f32"] = Field("f16", description="Type that weights are stored in.")
    height: int | None = Field(None, ge=8, description="Fix the picture's height, in pixels.")
    width: int | None = Field(None, ge=8, description="Fix the picture's width, in pixels.")
    batch: int | None = Field(None, ge=1, description="Fix the UNet's batch (twice the pictures under guidance).")


class DiffusersLoader:
    """Converts with `ov.convert_model`; needs torch, diffusers and transformers."""

    def __init__(self, options: DiffusersOptions) -> None:
        if (options.height is None) != (options.width is None):
            raise ConfigError("give both height and width, or neither", where="load (diffusers)")
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say YES to a folder with model_index.json and weights of PyTorch, and no OpenVINO model."""
        files = source.files()
        if "model_index.json" not in files or any(path.endswith(".xml") for path in files):
            return Match.NO
        weights = any(path.endswith((".safetensors", *_PICKLED)) for path in files)
        return Match.YES if weights else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle, its models still to be converted. Raises ModelError for what cannot be."""
        index = _json(source, "model_index.json")
        bundle = ModelBundle(index=index)
        for name, entry in index.items():
            if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
                continue
            self._component(bundle, source, name, str(entry[1]))
        for path in source.files():
            if path.endswith((".json", ".txt")) and path not in bundle.assets and _is_asset(path):
                bundle.assets[path] = source.read(path)
        return bundle

    def _component(self, bundle: ModelBundle, source: Source, name: str, kind: str) -> None:
        folder = _folder(source, name)
        if kind in _TEXT:
            bundle.configs[name] = _json(source, f"{name}/config.json")
            bundle.models.lazy(name, self._maker(source, folder, lambda: self._text_encoder(source, folder, kind)))
        elif kind == "UNet2DConditionModel":
            bundle.configs[name] = _json(source, f"{name}/config.json")
            bundle.models.lazy(name, self._maker(source, folder, lambda: self._unet(source, folder)))
        elif kind == "AutoencoderKL":
            config = _json(source, f"{name}/config.json")
            for part in ("vae_encoder", "vae_decoder"):
                bundle.configs[part] = config
                bundle.models.lazy(
                    part, self._maker(source, folder, lambda part=part: self._vae(source, folder, part))  # type: ignore[misc]
                )
        elif kind in _TOKENIZERS:
            detokenizer = name.replace("tokenizer", "detokenizer")
            bundle.models.lazy(name, self._maker(source, None, lambda: _tokenizer(folder, name)))
            bundle.models.lazy(detokenizer, self._maker(source, None, lambda: _detokenizer(folder, name)))
        elif name == "safety_checker":
            warnings.warn(f"{source.name}: the safety checker is not converted", stacklevel=4)
        elif name not in ("scheduler", "feature_extractor"):
            raise ModelError(
                f"the component {name!r} is a {kind}, which this loader does not convert",
                where=source.name,
                hint="It converts CLIP text encoders and tokenizers, UNet2DConditionModel and AutoencoderKL.",
            )

    def _maker(
        self, source: Source, weights: Path | None, convert: Callable[[], ov.Model]
    ) -> Callable[[], ov.Model]:
        """Return what converts a role when it is needed, with errors in our words and memory given back."""

        def make() -> ov.Model:
            for module in ("torch", "diffusers", "transformers"):
                need(module)
            if weights is not None:
                _check_weights(source, weights)
            try:
                return convert()
            except OvforgeError:
                raise
            except Exception as error:  # torch, safetensors and transformers raise many kinds
                raise ModelError(
                    f"cannot be converted: {type(error).__name__}: {error}",
                    where=f"{source.name}/{weights.name if weights else 'tokenizer'}",
                    hint="The files may be damaged or of another model: copy or download them again.",
                ) from error
            finally:
                gc.collect()

        return make

    def _text_encoder(self, source: Source, folder: Path, kind: str) -> ov.Model:
        import torch
        import transformers

        from ovforge_diffusers.modules import Outputs

        model, info = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
        _check_loaded(source, folder, info)
        ids = torch.ones(2, model.config.max_position_embeddings, dtype=torch.int64)
        names = ("last_hidden_state", "pooler_output") if kind == _TEXT[0] else ("text_embeds", "last_hidden_state")
        converted = _convert(Outputs(model, names), {"input_ids": ids}, names)
        converted.reshape({"input_ids": [-1, ids.shape[1]]})
        return self._compressed(converted)

    def _unet(self, source: Source, folder: Path) -> ov.Model:
        import diffusers
        import torch

        from ovforge_diffusers.modules import UNet

        model, info = diffusers.UNet2DConditionModel.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
        _check_loaded(source, folder, info)
        config = model.config
        # An odd latent size makes diffusers hand the skip connections' sizes on, so that the traced graph takes any size;
        # for a fixed size the plain upsampling by two is the faster graph.
        fixed = self._latent_size(_VAE_FACTOR)
        height, width = fixed or (2 ** len(config.block_out_channels) + 1, 2 ** len(config.block_out_channels) + 3)
        inputs = {
            "sample": torch.randn(2, config.in_channels, height, width),
            "timestep": torch.tensor([999], dtype=torch.int64),
            "encoder_hidden_states": torch.randn(2, 77, _width(config)),
        }
        if config.time_cond_proj_dim:
            inputs["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim)
        converted = _convert(UNet(model, tuple(inputs)), inputs, ("out_sample",))
        batch = self.options.batch or -1
        shapes: dict[str, list[int]] = {
            "sample": [batch, config.in_channels, *(fixed or (-1, -1))],
            "timestep": [1 if self.options.batch else -1],
            "encoder_hidden_states": [batch, -1, _width(config)],
        }
        if config.time_cond_proj_dim:
            shapes["timestep_cond"] = [batch, config.time_cond_proj_dim]
        converted.reshape(shapes)
        return self._compressed(converted)

    def _vae(self, source: Source, folder: Path, part: str) -> ov.Model:
        import diffusers
        import torch

        from ovforge_diffusers.modules import Decoder, Encoder

        model, info = diffusers.AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
        _check_loaded(source, folder, info)
        config = model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        fixed = self._latent_size(factor)
        if part == "vae_decoder":
            inputs = {"latent_sample": torch.randn(1, config.latent_channels, 8, 8)}
            converted = _convert(Decoder(model), inputs, ("sample",))
            converted.reshape({"latent_sample": [-1, config.latent_channels, *(fixed or (-1, -1))]})
        else:
            inputs = {"sample": torch.randn(1, config.in_channels, 8 * factor, 8 * factor)}
            converted = _convert(Encoder(model), inputs, ("latent_parameters",))
            size = (fixed[0] * factor, fixed[1] * factor) if fixed else (-1, -1)
            converted.reshape({"sample": [-1, config.in_channels, *size]})
        return self._compressed(converted)

    def _latent_size(self, factor: int) -> tuple[int, int] | None:
        if self.options.height is None or self.options.width is None:
            return None
        for name, pixels in (("height", self.options.height), ("width", self.options.width)):
            if pixels % factor:
                raise ConfigError(f"{pixels} is not a multiple of {factor}", where=f"load.{name}")
        return self.options.height // factor, self.options.width // factor

    def _compressed(self, model: ov.Model) -> ov.Model:
        """Store weights in half precision, as `ov.save_model` does; computing is up to the device."""
        if self.options.weights == "f16":
            from openvino._offline_transformations import compress_model_transformation

            compress_model_transformation(model)
        return model


def _convert(module: Any, inputs: dict[str, Any], outputs: tuple[str, ...]) -> ov.Model:
    """Trace and convert; inputs and outputs take their names."""
    import openvino as ov
    import torch

    module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every Python condition on a shape; parity tests show that the ones taken are right.
        warnings.simplefilter("ignore")
        model = ov.convert_model(module, example_input=inputs)
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    return model


def _width(config: Any) -> int:
    width = config.cross_attention_dim
    if not isinstance(width, int):
        raise ModelError("cross_attention_dim differs between blocks, which this loader does not convert", where="unet")
    return width


def _tokenizer(folder: Path, name: str) -> ov.Model:
    converters = need("openvino_tokenizers")
    model: ov.Model = converters.convert_tokenizer(_read_tokenizer(folder), max_length=77, use_max_padding=True)
    return model


def _detokenizer(folder: Path, name: str) -> ov.Model:
    converters = need("openvino_tokenizers")
    _, detokenizer = converters.convert_tokenizer(_read_tokenizer(folder), with_detokenizer=True)
    model: ov.Model = detokenizer
    return model


def _read_tokenizer(folder: Path) -> Any:
    transformers = need("transformers")
    return transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _folder(source: Source, name: str) -> Path:
    """Return a component's folder on disk; diffusers reads files by itself."""
    inside = [path for path in source.files() if path.startswith(f"{name}/")]
    if not inside:
        raise ModelError(f"model_index.json names {name!r}, and there is no such folder", where=source.name)
    local = source.local(inside[0])
    if local is None:
        raise ModelError(
            "conversion reads plain files only",
            where=source.name,
            hint="Convert the plain model first (ovforge convert), then keep the converted one encrypted.",
        )
    return local.parent


def _check_weights(source: Source, folder: Path) -> None:
    """Refuse folders without safetensors weights: pickles run code when they are read."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = [file.name for file in folder.iterdir() if file.suffix in _PICKLED]
    raise ModelError(
        f"{folder.name} holds {pickled[0]}, a pickle, and no safetensors" if pickled else f"{folder.name} has no weights",
        where=source.name,
        hint="Save it again with diffusers: pipeline.save_pretrained(folder, safe_serialization=True).",
    )


def _check_loaded(source: Source, folder: Path, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not hold exactly the model's weights: what is missing would be random."""
    for what, keys in (
        ("lacks", info.get("missing_keys")),
        ("has unknown", info.get("unexpected_keys")),
        ("has weights of other shapes:", info.get("mismatched_keys")),
    ):
        # Old checkpoints hold the position numbers, which are no weights.
        named = sorted(str(key) for key in keys or () if not str(key).endswith("position_ids"))
        if named:
            raise ModelError(
                f"{folder.name} {what} {', '.join(named[:3])}{' and more' if len(named) > 3 else ''}",
                where=source.name,
                hint="config.json and the weights must belong together.",
            )


def _is_asset(path: str) -> bool:
    """Say whether a file goes along: tokenizers' and schedulers' files; models' own configs are kept as configs."""
    return path.split("/")[0].startswith(("tokenizer", "scheduler", "feature_extractor")) or path == "ovforge.json"


def _json(source: Source, path: str) -> dict[str, Any]:
    try:
        value = json.loads(source.read(path))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", where=source.name) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold an object", where=source.name)
    return value
