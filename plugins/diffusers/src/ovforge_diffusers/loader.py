"""The loader: a diffusers folder or a checkpoint into a ModelBundle whose roles are converted when asked for."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle, Source
from ovforge_diffusers.checkpoint import Checkpoint
from ovforge_diffusers.components import find_components, is_gguf, read_contents
from ovforge_diffusers.convert import convert, quiet, without_initial_weights
from ovforge_diffusers.folder import INDEX, Folder, lone_component
from ovforge_diffusers.header import Shapes, checkpoint_file, find_parts
from ovforge_diffusers.ltx_upsampler import CLASS as UPSAMPLER
from ovforge_diffusers.ltx_upsampler import HOME as UPSAMPLER_HOME
from ovforge_diffusers.ltx_vae import CLASS as LTX_VAE
from ovforge_diffusers.ltx_vae import compression
from ovforge_diffusers.options import CHECKPOINT_OPTIONS, LoaderOptions
from ovforge_diffusers.qwen2_5_vl import CLASS as QWEN2_5_VL
from ovforge_diffusers.qwen2_5_vl import is_whole, made_whole, take_half
from ovforge_diffusers.requirements import need
from ovforge_diffusers.submodels import VISION, describe
from ovforge_diffusers.tokenization import TOKENIZERS, TokenizerFolder
from ovforge_diffusers.transformer_checkpoint import TransformerCheckpoint
from ovforge_diffusers.weights import STATISTICS, fill_weights, latent_statistics

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Conversion", "DiffusersLoader"]

DEFAULTS = "ovforge.json"
PICKLES = (".ckpt", ".pt", ".pth")
"""How pickles of whole models end."""
_MODELS = (".bin", ".gguf", ".json", ".onnx", ".safetensors", ".xml")
"""How files end beside which a pickle is not all that a folder has of a model."""
PURPOSE = "converting a diffusers folder"
HOMES = {
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
    "Qwen3Model": "transformers",
    "Qwen3ForCausalLM": "transformers",
    "SD3Transformer2DModel": "diffusers",
    "FluxTransformer2DModel": "diffusers",
    "Flux2Transformer2DModel": "diffusers",
    "ZImageTransformer2DModel": "diffusers",
    "Gemma2Model": "transformers",
    "SanaTransformer2DModel": "diffusers",
    "PixArtTransformer2DModel": "diffusers",
    "Lumina2Transformer2DModel": "diffusers",
    "AutoencoderDC": "diffusers",
    "Qwen2_5_VLForConditionalGeneration": "transformers",
    "QwenImageTransformer2DModel": "diffusers",
    "AutoencoderKLQwenImage": "diffusers",
    "LTXVideoTransformer3DModel": "diffusers",
    "AutoencoderKLLTXVideo": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "ControlNetModel": "diffusers",
    "SD3ControlNetModel": "diffusers",
    "FluxControlNetModel": "diffusers",
    "QwenImageControlNetModel": "diffusers",
    "SanaControlNetModel": "diffusers",
    "ZImageControlNetModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderKLFlux2": "diffusers",
    "AutoencoderTiny": "diffusers",
    UPSAMPLER: UPSAMPLER_HOME,
}
AUTOENCODERS = frozenset(
    {
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLQwenImage",
        LTX_VAE,
        "AutoencoderTiny",
        "AutoencoderDC",
    }
)
PROCESSORS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor", "VLProcessor")
"""How classes end that prepare pictures for a model: their components are small files. transformers 5 writes Pil."""


class DiffusersLoader:
    """Converts the components that model_index.json names, by their classes; or what stands alone."""

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say yes to a checkpoint, by its tensors' names; and to a folder of torch weights with model_index.json, or
        with config.json of a class that may stand alone; and to a tokenizer's folder.

        A folder that holds OpenVINO models already is not ours. A file that cannot be read, or a pickle, may be: `load`
        says what is wrong with it.
        """
        if (path := checkpoint_file(source)) is not None:
            try:
                shapes = read_contents(source, path).shapes
                return Match.YES if find_components(shapes) or find_parts(shapes) else Match.NO
            except ModelError:
                return Match.MAYBE
        files = [PurePosixPath(path) for path in source.files()]
        if any(file.name in ("openvino_model.xml", "openvino_tokenizer.xml") for file in files):
            return Match.NO
        if _pickle(source):
            return Match.MAYBE
        if PurePosixPath(INDEX) not in files:
            return Match.YES if lone_component(source) else Match.NO
        weights = any(len(file.parts) == 2 and file.suffix in (".safetensors", ".bin") for file in files)
        return Match.YES if weights else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle: configs and assets read, weights' files found, each model converted on first use.

        Raises PluginError without torch, ModelError for a component that is missing, damaged or not supported,
        ConfigError for an option that the source has no use for.
        """
        if pickle := _pickle(source):
            raise ModelError(
                f"{pickle} is a pickle, which can run code when it is opened",
                where=source.name,
                hint="Take the model's .safetensors or its diffusers folder, as most are published; or convert it "
                "where you trust it.",
            )
        for module in ("torch", "diffusers", "transformers", "safetensors"):
            need(module, PURPOSE)
        if (path := checkpoint_file(source)) is not None:
            if is_gguf(path) or _of_transformers(read_contents(source, path).shapes):
                return Conversion(TransformerCheckpoint(source, self.options), self.options).bundle()
            return Conversion(Checkpoint(source, self.options), self.options).bundle()
        for name in CHECKPOINT_OPTIONS:
            if getattr(self.options, name):
                raise ConfigError("is for a single-file checkpoint; a folder says it itself", where=f"load.{name}")
        return Conversion(Folder(source, self.options.variant), self.options).bundle()


def _of_transformers(shapes: Shapes) -> bool:
    """Say whether a file is for the pipelines of diffusion transformers, rather than for those of UNets."""
    found = find_components(shapes)
    return "transformer" in found or (bool(found) and not find_parts(shapes))


def _pickle(source: Source) -> str | None:
    """Return the first pickle of a source that has nothing else of a model."""
    files = sorted(source.files())
    if any(path.endswith(_MODELS) for path in files):
        return None
    return next((path for path in files if path.endswith(PICKLES)), None)


class Conversion:
    """One model being converted: a folder or a checkpoint, which give the same."""

    def __init__(self, parts: Folder | Checkpoint | TransformerCheckpoint, options: LoaderOptions) -> None:
        self.parts = parts
        self.options = options
        self.components = {name: kind for name, kind in parts.components.items() if name not in options.skip}
        self.index = parts.index

    def bundle(self) -> ModelBundle:
        """Return the bundle, its roles to be converted when they are asked for."""
        bundle = ModelBundle()
        bundle.index = dict(self.index)
        for component, kind in self.parts.components.items():
            if component in self.options.skip:
                self._leave_out(bundle, component, kind)
            elif kind in HOMES:
                self._add_models(bundle, component, kind)
            elif kind in TOKENIZERS:
                self._add_tokenizer(bundle, component, kind)
            elif kind.endswith(("Scheduler", *PROCESSORS)):
                bundle.assets.update(self.parts.assets(component))
            else:
                raise ModelError(
                    f"the component {component} is a {kind}, which this loader cannot convert",
                    where=f"{self.parts.name}: {INDEX}",
                    hint=f"It converts {', '.join([*HOMES, *sorted(TOKENIZERS)])}. "
                    f"To go without it, add {component!r} to the loader's option skip.",
                )
        if defaults := self.parts.file(DEFAULTS):
            bundle.assets[DEFAULTS] = defaults
        if not bundle.models:
            raise ModelError("it names no model", where=f"{self.parts.name}: {INDEX}")
        return bundle

    def _leave_out(self, bundle: ModelBundle, component: str, kind: str) -> None:
        warnings.warn(f"{self.parts.name}: {component} ({kind}) is left out", stacklevel=5)
        bundle.index[component] = [None, None]
        if component == "safety_checker" and "requires_safety_checker" in bundle.index:
            bundle.index["requires_safety_checker"] = False

    def _add_models(self, bundle: ModelBundle, component: str, kind: str) -> None:
        if kind in AUTOENCODERS and component != "vae":
            raise ModelError(f"an {kind} named {component} is not known, only vae", where=f"{self.parts.name}: {INDEX}")
        config = self._full_config(component, kind)
        read = self.parts.weights(component)
        if kind in STATISTICS:
            assert not isinstance(self.parts, Checkpoint)  # which holds older autoencoders
            tensors = self.parts.tensors(component, STATISTICS[kind])
            config |= latent_statistics(kind, tensors, config, self.parts.where(component))

        def lazy(role: str) -> None:
            bundle.configs[role] = config
            bundle.models.lazy(role, lambda: self._convert(role, component, kind, read))

        for role in self._roles(component, kind, config):
            lazy(role)

    def _roles(self, component: str, kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
        if component == "vae":
            return ("vae_encoder", "vae_decoder")
        sees = kind == QWEN2_5_VL and is_whole(config) and (self._sees() or self.parts.alone)
        return (component, VISION) if sees else (component,)

    def _sees(self) -> bool:
        """Say whether the pipeline shows pictures to its text encoder, and beside the latents."""
        return "Edit" in str(self.index.get("_class_name"))

    def _add_tokenizer(self, bundle: ModelBundle, component: str, kind: str) -> None:
        folder = TokenizerFolder(
            component,
            kind,
            self.parts.assets(component),
            where=f"{self.parts.name}: {component}",
            protected=self.parts.protected,
        )
        bundle.assets.update(folder.assets())
        bundle.models.lazy(component, lambda: folder.models()[0])
        bundle.models.lazy(component.replace("tokenizer", "detokenizer"), lambda: folder.models()[1])

    def _convert(self, role: str, component: str, kind: str, read: Callable[[], Mapping[str, Any]]) -> ov.Model:
        module = self.module(component, kind)
        submodel = describe(role, module, self.options, self.index, self._context())
        values = fill_weights(module, read(), self.parts.where(component), self.parts.misfit)
        disk = not self.parts.protected  # what was encrypted stays in memory
        return convert(role, module.eval(), submodel, self.options.weights, values, disk=disk)

    def module(self, component: str, kind: str) -> Any:
        """Make the torch module of a component's config. Raises ModelError if the config makes no sense."""
        cls = getattr(need(HOMES[kind], PURPOSE), kind)
        config = self.parts.config(component)
        try:
            with quiet(), without_initial_weights():
                if HOMES[kind] == "transformers":
                    whole = made_whole(config) if kind == QWEN2_5_VL else config
                    settings = cls.config_class.from_dict(whole)
                    settings.dtype = None  # the type of the stored weights: parts of a model would be made in it
                    module = cls(settings)
                    if kind == QWEN2_5_VL:
                        take_half(module, config)
                    return module
                return cls.from_config(config)
        except Exception as error:  # whatever a class raises on a config, the config is what is wrong
            raise ModelError(
                f"no {kind} can be made of its config: {error}", where=self.parts.where(component)
            ) from error

    def _full_config(self, component: str, kind: str) -> dict[str, Any]:
        """Return the config with the class's defaults spelled out, as readers of the export expect."""
        config = self.parts.config(component)
        cls = getattr(need(HOMES[kind], PURPOSE), kind)
        if HOMES[kind] == "transformers":
            return {**json.loads(cls.config_class().to_json_string(use_diff=False)), **config}
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**json.loads(json.dumps(defaults)), **config}

    def _context(self) -> dict[str, Any]:
        """Return what one submodel must know of the others."""
        components = self.components
        vae = self._full_config("vae", components["vae"]) if "vae" in components else {}
        names = ("block_out_channels", "decoder_block_out_channels", "dim_mult")
        widths = next((vae[name] for name in names if vae.get(name)), None)
        levels = len(widths) if widths else 4
        video = components.get("vae") == LTX_VAE
        scheduler = self.parts.optional("scheduler", "scheduler_config.json")
        return {
            "vae_factor": compression(vae) if video else 2 ** (levels - 1),
            "patch": self._patch(),
            "tokens": self._tokens(),
            "prediction_type": scheduler.get("prediction_type"),
            # What stands alone may be put into a pipeline of any kind.
            "alone": self.parts.alone,
            "beside": self.parts.alone or self._sees(),
        }

    def _patch(self) -> int:
        """Return how many latents a side are one token: 2 in every transformer but those that say it."""
        components = self.components
        role = "transformer" if "transformer" in components else "controlnet"
        kind = components.get(role, "ControlNetModel")
        if kind.startswith(("Sana", "PixArt", "Lumina2")):
            return int(self._full_config(role, kind)["patch_size"])
        return 1 if kind in ("ControlNetModel", "LTXVideoTransformer3DModel") else 2

    def _tokens(self) -> int | None:
        """Return the tokenizer's length, which a UNet of fixed sizes takes; None if it sets no limit."""
        last = max((name for name, kind in self.components.items() if kind in TOKENIZERS), default=None)
        length = self.parts.optional(last, "tokenizer_config.json").get("model_max_length") if last else None
        return length if isinstance(length, int) and 0 < length < 2**17 else None
