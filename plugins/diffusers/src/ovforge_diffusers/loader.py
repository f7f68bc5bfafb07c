"""The loader: a diffusers folder into a ModelBundle whose roles are converted when they are asked for."""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.bundle import ModelBundle
from ovforge.errors import ModelError
from ovforge.sources import Source
from ovforge.stages import Match
from ovforge_diffusers.convert import convert, quiet, settle_names, without_initial_weights
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.requirements import need
from ovforge_diffusers.submodels import describe
from ovforge_diffusers.weights import fill_weights, read_weights, weight_files

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["DiffusersLoader"]

INDEX = "model_index.json"
DEFAULTS = "ovforge.json"
PURPOSE = "converting a diffusers folder"
INCOMPLETE = "The folder may be an incomplete download: fetch it again."
HOMES = {
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "UNet2DConditionModel": "diffusers",
    "AutoencoderKL": "diffusers",
}
TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
PROCESSORS = frozenset({"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"})
ASSET_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})
# Where a model came from is its owner's business, often a path of their machine.
PRIVATE = frozenset({"_name_or_path"})


class DiffusersLoader:
    """Converts the components that model_index.json names, by their classes."""

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say yes to a folder with model_index.json and torch weights, unless it holds OpenVINO models already."""
        files = [PurePosixPath(path) for path in source.files()]
        if PurePosixPath(INDEX) not in files or any(file.name == "openvino_model.xml" for file in files):
            return Match.NO
        weights = any(len(file.parts) == 2 and file.suffix in (".safetensors", ".bin") for file in files)
        return Match.YES if weights else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle: configs and assets read, weights' files found, each model converted on first use.

        Raises PluginError without torch, ModelError for a component that is missing, damaged or not supported.
        """
        for module in ("torch", "diffusers", "transformers", "safetensors"):
            need(module, PURPOSE)
        return _Conversion(source, self.options).bundle()


class _Conversion:
    """One folder being converted."""

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        self.source = source
        self.options = options
        self.index = self._json(INDEX)
        self.components: dict[str, str] = {
            name: str(value[1])
            for name, value in self.index.items()
            if isinstance(value, list) and len(value) == 2 and value[1] is not None
        }

    def bundle(self) -> ModelBundle:
        bundle = ModelBundle()
        bundle.index = {key: value for key, value in self.index.items() if key not in PRIVATE}
        for component, kind in self.components.items():
            if component in self.options.skip:
                self._leave_out(bundle, component, kind)
            elif kind in HOMES:
                self._add_models(bundle, component, kind)
            elif kind in TOKENIZERS:
                self._add_tokenizer(bundle, component)
            elif kind.endswith("Scheduler") or kind in PROCESSORS:
                bundle.assets.update(self._assets(component))
            else:
                raise ModelError(
                    f"the component {component} is a {kind}, which this loader cannot convert",
                    where=f"{self.source.name}: {INDEX}",
                    hint=f"It converts {', '.join([*HOMES, *sorted(TOKENIZERS)])}. "
                    f"To go without it, add {component!r} to the loader's option skip.",
                )
        if DEFAULTS in self.source.files():
            bundle.assets[DEFAULTS] = self.source.read(DEFAULTS)
        if not bundle.models:
            raise ModelError("it names no model", where=f"{self.source.name}: {INDEX}")
        return bundle

    def _leave_out(self, bundle: ModelBundle, component: str, kind: str) -> None:
        warnings.warn(f"{self.source.name}: {component} ({kind}) is left out", stacklevel=5)
        bundle.index[component] = [None, None]
        if component == "safety_checker" and "requires_safety_checker" in bundle.index:
            bundle.index["requires_safety_checker"] = False

    def _add_models(self, bundle: ModelBundle, component: str, kind: str) -> None:
        if kind == "AutoencoderKL" and component != "vae":
            raise ModelError(
                f"an AutoencoderKL named {component} is not known, only vae", where=f"{self.source.name}: {INDEX}"
            )
        config = self._full_config(component, kind)
        files = weight_files(self.source, component, self.options.variant)

        def lazy(role: str) -> None:
            bundle.configs[role] = config
            bundle.models.lazy(role, lambda: self._convert(role, component, kind, files))

        for role in ("vae_encoder", "vae_decoder") if component == "vae" else (component,):
            lazy(role)

    def _add_tokenizer(self, bundle: ModelBundle, component: str) -> None:
        files = self._assets(component)
        names = {PurePosixPath(path).name for path in files}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise ModelError(
                f"{component} needs tokenizer.json, or vocab.json and merges.txt",
                where=self.source.name,
                hint=INCOMPLETE,
            )
        bundle.assets.update(files)
        bundle.models.lazy(component, lambda: self._tokenizer(component, files)[0])
        reverse = component.replace("tokenizer", "detokenizer")
        bundle.models.lazy(reverse, lambda: self._tokenizer(component, files)[1])

    def _assets(self, component: str) -> dict[str, bytes]:
        """Return a component's small files, which go along as they are."""
        found = {
            path: self.source.read(path)
            for path in self.source.files()
            if path.startswith(f"{component}/") and PurePosixPath(path).suffix in ASSET_SUFFIXES
        }
        if not found:
            raise ModelError(
                f"the folder {component}/ is missing or empty, {INDEX} names it",
                where=self.source.name,
                hint=INCOMPLETE,
            )
        return found

    def _convert(self, role: str, component: str, kind: str, files: list[str]) -> ov.Model:
        module = self._module(component, kind)
        submodel = describe(role, module, self.options, self.index, self._context())
        fill_weights(module, read_weights(self.source, files), f"{self.source.name}: {component}")
        return convert(role, module.eval(), submodel, self.options.weights)

    def _module(self, component: str, kind: str) -> Any:
        """Make the torch module of a component's config. Raises ModelError where the config makes no sense."""
        cls = getattr(need(HOMES[kind], PURPOSE), kind)
        config = self._config(component)
        try:
            with quiet(), without_initial_weights():
                if HOMES[kind] == "transformers":
                    return cls(cls.config_class.from_dict(config))
                return cls.from_config(config)
        except Exception as error:  # whatever a class raises on a config, the config is what is wrong
            raise ModelError(
                f"no {kind} can be made of it: {error}", where=f"{self.source.name}: {component}/config.json"
            ) from error

    def _full_config(self, component: str, kind: str) -> dict[str, Any]:
        """Return the config with the class's defaults spelled out, as readers of the export expect."""
        config = self._config(component)
        cls = getattr(need(HOMES[kind], PURPOSE), kind)
        if HOMES[kind] == "transformers":
            return {**json.loads(cls.config_class().to_json_string(use_diff=False)), **config}
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**json.loads(json.dumps(defaults)), **config}

    def _context(self) -> dict[str, Any]:
        """Return what one submodel must know of the others."""
        levels = len(self._config("vae").get("block_out_channels", [64])) if "vae" in self.components else 4
        scheduler = self._optional("scheduler/scheduler_config.json")
        return {
            "vae_factor": 2 ** (levels - 1),
            "tokens": self._tokens(),
            "prediction_type": scheduler.get("prediction_type"),
        }

    def _tokens(self) -> int | None:
        """Return the tokenizer's length, which a UNet of fixed sizes takes; None where it sets no limit."""
        last = max((name for name, kind in self.components.items() if kind in TOKENIZERS), default=None)
        length = self._optional(f"{last}/tokenizer_config.json").get("model_max_length") if last else None
        return length if isinstance(length, int) and 0 < length < 2**17 else None

    def _tokenizer(self, component: str, files: dict[str, bytes]) -> tuple[ov.Model, ov.Model]:
        """Convert a tokenizer: it pads and cuts to its model_max_length, as diffusers' pipelines ask of it.

        transformers reads tokenizers from files alone, so that these few are laid out in a private folder.
        """
        transformers = need("transformers", PURPOSE)
        tokenizers = need("openvino_tokenizers", PURPOSE)
        with tempfile.TemporaryDirectory(prefix="ovforge-") as folder:
            for path, data in files.items():
                (Path(folder) / PurePosixPath(path).name).write_bytes(data)
            try:
                with quiet():
                    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                    limited = tokenizer.model_max_length < 2**17
                    models = tokenizers.convert_tokenizer(
                        tokenizer, with_detokenizer=True, use_max_padding=limited, truncation=limited
                    )
            except Exception as error:  # the parsers of vocabularies raise bare Exception
                raise ModelError(
                    f"the tokenizer cannot be converted: {error}",
                    where=f"{self.source.name}: {component}",
                    hint="Its files may be damaged: fetch them again.",
                ) from error
        for role, model in zip((component, f"de{component}"), models, strict=True):
            settle_names(role, model)
        return models[0], models[1]

    def _config(self, component: str) -> dict[str, Any]:
        config = self._json(f"{component}/config.json")
        return {key: value for key, value in config.items() if key not in PRIVATE}

    def _optional(self, path: str) -> dict[str, Any]:
        return self._json(path) if path in self.source.files() else {}

    def _json(self, path: str) -> dict[str, Any]:
        try:
            value = json.loads(self.source.read(path))
        except ValueError as error:
            raise ModelError(f"not valid JSON: {error}", where=f"{self.source.name}: {path}") from error
        if not isinstance(value, dict):
            raise ModelError("expected a JSON object", where=f"{self.source.name}: {path}")
        return value
