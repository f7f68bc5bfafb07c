"""A single file of a diffusion transformer, or of models that belong to one, seen as a diffusers folder.

Such a file holds a transformer, an autoencoder and text encoders, all of them or one alone, or a ControlNet:
safetensors of any float type, or GGUF.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from ovforge import open_file
from ovforge.errors import ConfigError, ModelError
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_convert import TensorWeight
from ovforge_diffusers.autoencoders import autoencoder_config, autoencoder_names, autoencoder_weights
from ovforge_diffusers.components import CLIP, TEXT_ENCODERS, find_components
from ovforge_diffusers.file_tokenizers import SENTENCEPIECE, TOKENIZER_CLASSES, find_tokenizer
from ovforge_diffusers.folder import Folder
from ovforge_diffusers.header import Part, Shapes, checkpoint_file
from ovforge_diffusers.ltx_upsampler import ltx_upsampler_config
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.requirements import need
from ovforge_diffusers.sight import SIGHT, sight_weights
from ovforge_diffusers.stored import SCALES, joined
from ovforge_diffusers.stored_file import StoredFile
from ovforge_diffusers.submodels import VISION
from ovforge_diffusers.text_configs import text_encoder_config, text_encoder_names, uses_projection
from ovforge_diffusers.transformer_configs import ZERO_TIMESTEP, scheduler_config, transformer_config
from ovforge_diffusers.transformer_families import FAMILIES, Family, stored_as
from ovforge_diffusers.transformer_names import diffusers_rows

if TYPE_CHECKING:
    from ovforge_diffusers.transformer_names import Slice

__all__ = ["TransformerCheckpoint"]

_BESIDE = re.compile(
    rf"(.*\.)?scaled_fp8$|.*\.(scale_input|input_scale|comfy_quant)$|(.*\.)?logit_scale$|.*position_ids$"
    rf"|(.*\.)?norm_final\.weight$|(.*\.)?{ZERO_TIMESTEP}$|(.*\.)?per_channel_statistics\.(?!(mean|std)-of-means$)"
)
"""What float8 files hold for programs that compute in float8, marks of ComfyUI, and what is of training only."""

_PROJECTION = "text_projection.weight"
_LATENTS = 16
"""Channels of Z-Image's latents."""


class TransformerCheckpoint:
    """A file of a transformer, an autoencoder or text encoders, or of several of them, in any of their namings.

    Configs are those of `options.config`, a diffusers folder, or inferred from shapes. Raises ModelError for a file
    that is damaged or of another kind, ConfigError for an option that it has no use for.
    """

    misfit = "The file is damaged, or of a variety that is not known."

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        self.name = source.name
        self.protected = source.protection is not None
        self._options = options
        self._file = StoredFile(source, checkpoint_file(source) or "")
        self._shapes = self._file.shapes
        found = find_components(self._shapes)
        if not found:
            raise ModelError(
                "it holds no diffusion transformer that is known, nor an autoencoder or a text encoder of one",
                where=source.name,
                hint="It may be an adapter, or a model of another kind.",
            )
        if "controlnet" in found and found["controlnet"].naming == "original":
            raise ModelError(
                "it holds a ControlNet that is, by its names, not one of diffusers' for SD 3, FLUX or Qwen-Image",
                where=source.name,
                hint="Take the ControlNet's diffusers folder, with config.json; of XLabs' those with `-diffusers`.",
            )
        if "transformer" in found and found["transformer"].kind not in FAMILIES:
            raise ModelError(
                f"it holds a {found['transformer'].kind}, which is read from a diffusers folder alone",
                where=source.name,
                hint="Take the transformer's folder, with config.json beside its weights.",
            )
        self._family = FAMILIES[found["transformer"].kind] if "transformer" in found else None
        self._parts, self.components = self._assigned(found)
        self.alone = len(self._parts) == 1
        self._check_options()
        self._folder = Folder(open_file(options.config), None) if options.config else None
        self._names: dict[str, dict[str, str]] = {}
        self._rows: dict[str, list[Slice]] | None = None
        self._configs = {component: self._read_config(component) for component in self._parts}
        self.index: dict[str, Any] = {}
        self._assets: dict[str, dict[str, bytes]] = {}
        self._warn_of_rest()
        self._warn_of_dequantized()
        for component in [name for name in self._parts if name.startswith("text_encoder")]:
            self._add_tokenizer(component)
        if self._family is not None:
            self._add_scheduler()
            self.index = self._make_index(self._family)

    def where(self, component: str) -> str:
        """Name a component in messages."""
        return self.name if self.alone else f"{self.name}: {component}"

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config."""
        return self._configs[component]

    def optional(self, component: str, name: str) -> dict[str, Any]:
        """Return a JSON file of the scheduler or a tokenizer; {} for what a file does not hold."""
        path = f"{component}/{name}"
        return parse_object(self._assets.get(component, {}).get(path, b"{}"), path)

    def assets(self, component: str) -> dict[str, bytes]:
        """Return the small files of the scheduler or a tokenizer."""
        return self._assets[component]

    def file(self, path: str) -> bytes | None:
        """Return None: there is nothing beside the file."""
        return None

    def tensors(self, component: str, names: Collection[str]) -> dict[str, Any]:
        """Read some of a component's tensors alone, by diffusers' names or those that they have in it."""
        prefix = self._parts[component].prefix
        own = {prefix + name: name for name in names if prefix + name in self._shapes}
        return self._file.tensors(own | {stored: new for stored, new in self._names[component].items() if new in names})

    def weights(self, component: str) -> Callable[[], Mapping[str, Any]]:
        """Return a function that reads a component's weights, in the naming of its class."""
        return lambda: self._read(component)

    # -- what the file is -----------------------------------------------------------------------------------------

    def _assigned(self, found: Mapping[str, Part]) -> tuple[dict[str, Part], dict[str, str]]:
        """Return the parts by their roles, and the classes that these roles have.

        Of two CLIPs the first is OpenAI's, the second OpenCLIP's, which is wider. Text encoders that the family does
        not take are left over.
        """
        parts = {
            name: found[name] for name in ("transformer", "vae", "controlnet", "latent_upsampler") if name in found
        }
        kinds = {name: part.kind for name, part in parts.items()}
        texts = sorted((part for part in found.values() if part.kind in TEXT_ENCODERS), key=self._by_width)
        if self._family is None:
            if len(texts) > 1:
                raise ModelError(
                    "it holds several text encoders, and no transformer that tells their roles",
                    where=self.name,
                    hint="Take files of one text encoder each: [load.parts] text_encoder = FILE, ...",
                )
            for text in texts:
                role = VISION if text.naming == SIGHT else "text_encoder"
                parts[role], kinds[role] = text, text.kind
            return parts, kinds
        for role, kind in self._family.encoders.items():
            if fitting := [text for text in texts if text.kind == stored_as(kind)]:
                texts.remove(fitting[0])
                parts[role], kinds[role] = fitting[0], kind
        return parts, kinds

    def _by_width(self, part: Part) -> tuple[bool, int]:
        marks = ("text_model.embeddings.position_embedding.weight", "embeddings.position_embedding.weight")
        shapes = [self._shapes[part.prefix + mark] for mark in marks if part.prefix + mark in self._shapes]
        return "clip_g" in part.prefix, shapes[0][-1] if shapes and shapes[0] else 0

    def _check_options(self) -> None:
        for option in ("prediction_type", "ema"):
            if getattr(self._options, option):
                raise ConfigError("is for checkpoints of Stable Diffusion 1, 2 and XL", where=f"load.{option}")
        if self._options.tokenizer and not any(name.startswith("text_encoder") for name in self._parts):
            raise ConfigError(
                "is for a file that holds a text encoder, and this one holds none",
                where="load.tokenizer",
                hint="Name it beside its text encoder: [load.parts] tokenizer = FOLDER",
            )

    def _own(self, component: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a part's tensors by their names without its prefix; not what lies beside them."""
        part = self._parts[component]
        others = tuple(
            prefix
            for prefix in (
                *(each.prefix for each in self._parts.values()),
                "first_stage_model.",
                "vae.",
                "text_encoders.",
            )
            if prefix != part.prefix and prefix.startswith(part.prefix)
        )
        return {
            name.removeprefix(part.prefix): shape
            for name, shape in self._shapes.items()
            if name.startswith(part.prefix)
            and not name.startswith(others)
            and not name.endswith(SCALES)
            and not _BESIDE.match(name)
            and name != SENTENCEPIECE
        }

    # -- configs ----------------------------------------------------------------------------------------------------

    def _read_config(self, component: str) -> dict[str, Any]:
        """Return a component's config, and note which of its tensors have which names."""
        try:
            own = self._own(component)
            if component == "transformer":
                return self._transformer_config(own)
            if component == "vae":
                return self._vae_config(own)
            if component == "controlnet":
                return self._controlnet_config(own)
            if component == "latent_upsampler":
                return self._upsampler_config(own)
            return self._text_config(component, own)
        except (ModelError, LookupError, ValueError, TypeError, ArithmeticError) as error:  # shapes that no model has
            if isinstance(error, ModelError) and error.where:
                raise
            what = error.what if isinstance(error, ModelError) else f"its tensors have shapes of no model: {error}"
            raise ModelError(what, where=self.where(component), hint=self.misfit) from error

    def _transformer_config(self, own: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        part = self._parts["transformer"]
        self._names["transformer"] = {part.prefix + name: name for name in own}
        named: Shapes = own
        if part.naming != "diffusers":
            self._rows = diffusers_rows(part.kind, own)
            named = {
                new: (sum(end - begin for _, begin, end in slices), *own[slices[0][0]][1:])
                for new, slices in self._rows.items()
            }
        if given := self._given("transformer", part.kind):
            return given
        marks = {name: () for name in (ZERO_TIMESTEP,) if part.prefix + name in self._shapes}
        return transformer_config(part.kind, {**named, **marks})

    def _controlnet_config(self, own: Shapes) -> dict[str, Any]:
        part = self._parts["controlnet"]
        self._names["controlnet"] = {part.prefix + name: name for name in own}
        if given := self._given("controlnet", part.kind):
            return given
        config = transformer_config(part.kind, own)
        if part.kind == "ZImageControlNetModel":
            config |= self._zimage_refiners(config)
        if config.get("force_zeros_for_pooled_projection") and not config["extra_conditioning_channels"]:
            self._say(
                "it does not say whether it was trained with pooled states of the text: it is taken as InstantX's, "
                "which were not. The option config = FOLDER, with the ControlNet's config.json, makes it certain"
            )
        return config

    def _upsampler_config(self, own: Shapes) -> dict[str, Any]:
        part = self._parts["latent_upsampler"]
        self._names["latent_upsampler"] = {part.prefix + name: name for name in own}
        return self._given("latent_upsampler", part.kind) or ltx_upsampler_config(own)

    def _zimage_refiners(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a ControlNet of Z-Image does to the transformer's refiners: by its own, or by its first layers.

        Only those that can paint as well, which are newer, do anything. Versions 2.0 bring refiners that are not used.
        """
        first = "control_noise_refiner.0.before_proj.weight"
        if config["control_in_dim"] == _LATENTS:
            return {}
        trained = any(bool(tensor.any()) for tensor in self.tensors("controlnet", [first]).values())
        if not trained:
            names = self._names["controlnet"]
            unused = "control_noise_refiner."
            self._names["controlnet"] = {old: new for old, new in names.items() if not new.startswith(unused)}
        own = "control_noise_refiner" if trained else "control_layers"
        places = list(range(config["n_refiner_layers"]))
        return {"add_control_noise_refiner": own, "control_refiner_layers_places": places}

    def _vae_config(self, own: Shapes) -> dict[str, Any]:
        part = self._parts["vae"]
        given = self._given("vae", part.kind)
        latents = self._family.latents if self._family else None
        config = given or autoencoder_config(part, {part.prefix + name: shape for name, shape in own.items()}, latents)
        self._names["vae"] = autoencoder_names(part, {part.prefix + name: shape for name, shape in own.items()}, config)
        if part.kind == "AutoencoderKL" and config.get("scaling_factor") is None:
            self._say(
                "an autoencoder of 16 channels does not say whether it is that of FLUX.1 or of Stable Diffusion 3, "
                "which scale latents by other factors: the transformer beside it decides. Alone, its config.json says "
                "scaling_factor = null; the option config = FOLDER, with a diffusers folder, gives it"
            )
        return config

    def _text_config(self, component: str, own: Shapes) -> dict[str, Any]:
        part, kind = self._parts[component], self.components[component]
        names = text_encoder_names(part, {part.prefix + name: () for name in own})
        inferred = text_encoder_config(
            part, {new: self._shapes[name] for name, new in names.items()}, self._file.metadata
        )
        config = self._given(component, kind, inferred) or {**inferred, "architectures": [kind]}
        if kind == "CLIPTextModel" or (part.kind == CLIP and not uses_projection(part, config)):
            unused = [name for name, new in names.items() if new == _PROJECTION]
            self._warn_of_projection(part, unused)
            names = {name: new for name, new in names.items() if name not in unused}
        if kind == "Qwen3Model":
            names = {name: new for name, new in names.items() if new != "lm_head.weight"}
        self._names[component] = names
        return config

    def _given(self, component: str, kind: str, inferred: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Return the config of the option's folder, if it has a component of this class; of several, one that fits.

        A file of one part alone may be any of a pipeline's: its class counts, and the width of its states.
        """
        folder = self._folder
        if folder is None:
            return None
        fitting = [name for name, its in folder.components.items() if stored_as(its) == stored_as(kind)]
        if self._family is not None:
            fitting = [name for name in fitting if name == component]
        if not fitting:
            if self.alone:
                raise ModelError(f"it has no {kind}", where=f"load.config: {folder.name}")
            return None
        configs = [folder.config(name) for name in fitting]
        widths = ("hidden_size", "d_model")
        alike = [
            config for config in configs if inferred and all(config.get(name) == inferred.get(name) for name in widths)
        ]
        return (alike or configs)[0]

    # -- weights ----------------------------------------------------------------------------------------------------

    def _read(self, component: str) -> Mapping[str, Any]:
        part, names = self._parts[component], self._names[component]
        if component == "vae":
            try:
                return autoencoder_weights(part, self._file.tensors(names), self._configs["vae"])
            except ModelError as error:
                raise ModelError(error.what, where=self.where("vae"), hint=self.misfit) from error
        weights = self._file.weights(names)
        if component == "transformer":
            return weights if self._rows is None else joined(weights, self._rows)
        if part.naming == SIGHT:
            return sight_weights(weights, self.where(component))
        if self.components[component] == CLIP and _PROJECTION not in weights:
            eye = need("torch", "converting a checkpoint").eye(self._configs[component]["projection_dim"])
            return {**weights, _PROJECTION: TensorWeight(eye)}  # as diffusers fills it in: what is pooled is taken
        return weights

    # -- tokenizers and the scheduler -----------------------------------------------------------------------------

    def _add_tokenizer(self, encoder: str) -> None:
        """Find an encoder's tokenizer: by the options, in the file, beside it, or in an installed package."""
        part, component = self._parts[encoder], encoder.replace("text_encoder", "tokenizer")
        kind = TOKENIZER_CLASSES[part.kind]
        files = find_tokenizer(component, kind, self._configs[encoder], self._file, self._options, alone=self.alone)
        if files is not None:
            self._assets[component] = files
            self.components[component] = kind
        elif self._family is not None:
            self._say(
                f"it brings no {component}: name a folder that holds it, by [load.parts] {component} = FOLDER, or by "
                "the option tokenizer = FOLDER, which may be a diffusers folder of the family"
            )

    def _add_scheduler(self) -> None:
        kind = self._parts["transformer"].kind
        scheduler = scheduler_config(kind, self._configs["transformer"], self._configs.get("vae", {}))
        if self._folder and "scheduler" in self._folder.components:
            scheduler = self._folder.optional("scheduler", "scheduler_config.json")
        self._assets["scheduler"] = {"scheduler/scheduler_config.json": json.dumps(scheduler, indent=2).encode()}
        self.components["scheduler"] = str(scheduler["_class_name"])

    def _make_index(self, family: Family) -> dict[str, Any]:
        """Return model_index.json: that of the option's folder counts for what the file does not say."""
        index: dict[str, Any] = {"_class_name": family.pipeline}
        if self._folder and family.has(self._folder.index.get("_class_name")):
            own = self._folder.index
            index = {name: value for name, value in own.items() if not isinstance(value, list)}
        elif family.pipeline == "Flux2KleinPipeline":
            index["is_distilled"] = distilled = "base" not in self.name.rpartition("/")[2].lower()
            self._say(
                f"it does not say whether it is distilled: by its name it is{'' if distilled else ' not'}. "
                "The option config = FOLDER, with a diffusers folder, makes it certain"
            )
        libraries = {"CLIPTextModel", "Qwen3ForCausalLM", *TEXT_ENCODERS, *TOKENIZER_CLASSES.values()}
        return index | {
            name: ["transformers" if kind in libraries else "diffusers", kind] for name, kind in self.components.items()
        }

    # -- what is said ---------------------------------------------------------------------------------------------

    def _warn_of_rest(self) -> None:
        """Say which tensors belong to no submodel."""
        known = {name for names in self._names.values() for name in names} | {SENTENCEPIECE}
        known |= {part.prefix + _PROJECTION for part in self._parts.values() if part.kind == CLIP}
        if "vae" in self._parts:  # what an autoencoder's training leaves is left out, as in all checkpoints
            prefix = self._parts["vae"].prefix
            known |= {name for name in self._shapes if prefix and name.startswith(prefix)}
        if any(kind == "Qwen3Model" for kind in self.components.values()):
            known |= {name for name in self._shapes if name.endswith(("lm_head.weight", "output.weight"))}
        rest = [
            name for name in self._shapes if name not in known and not name.endswith(SCALES) and not _BESIDE.match(name)
        ]
        if rest:
            others = any(name.startswith("text_encoders.") for name in rest)
            advice = " Text encoders come from another model: [load.parts]" if others else ""
            self._say(f"{len(rest)} tensors belong to no submodel and are left out: {', '.join(rest[:3])}...{advice}")

    def _warn_of_projection(self, part: Part, names: list[str]) -> None:
        """Say that a projection is left out that would change something: pipelines take what CLIP pools as it is."""
        for tensor in self._file.tensors({name: name for name in names}).values():
            eye = need("torch", "converting a checkpoint").eye(*tensor.shape)
            if tensor.ndim != 2 or not (tensor.float() == eye).all():
                self._say("its text_projection is left out: pipelines take what this text encoder pools as it is")

    def _warn_of_dequantized(self) -> None:
        """Say which quantized tensors of a GGUF file do not stay compressed."""
        if self._options.weights == "f32":
            return
        found: dict[str, list[str]] = {}
        for component, names in self._names.items():
            if component == "vae":  # whose convolutions were never to stay compressed
                continue
            rows = self._rows if component == "transformer" else None
            for kind, each in self._file.dequantized(names, rows).items():
                found.setdefault(kind, []).extend(each)
        for kind, several in found.items():
            self._say(f"{len(several)} tensors of {kind} do not stay compressed: {', '.join(several[:3])}...")

    def _say(self, what: str) -> None:
        warnings.warn(f"{self.name}: {what}", stacklevel=6)
