"""A single-file checkpoint, seen as a diffusers folder: the same components, configs, weights and small files."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge import open_file
from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_diffusers import infer
from ovforge_diffusers.families import Family, identify
from ovforge_diffusers.folder import Folder
from ovforge_diffusers.header import checkpoint_file, find_parts, read_header
from ovforge_diffusers.naming import original_name, to_diffusers
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.vocabulary import tokenizer_files
from ovforge_diffusers.weights import check_file, read_weights

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

Tensors = dict[str, "torch.Tensor"]

_TRAINING = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights$|logvar$|scale_factor$|global_step$"
    r"|denoiser\.sigmas$|v_pred$|ztsnr$|edm_(mean|std)$"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(transformer\.|model\.)?(logit_scale|text_projection)"
)
"""What checkpoints keep of their training: averages, noise schedules, and projections that are not used."""


class Checkpoint:
    """One safetensors file with what diffusers keeps in a folder, in CompVis' and Stability's naming or in diffusers'.

    Configs are those of `options.config`, a diffusers folder, or inferred from shapes and family. Raises ModelError
    for a file that is damaged, of another kind, or without a tokenizer.
    """

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        self.name = source.name
        self.protected = source.protection is not None
        self._source = source
        self._options = options
        self._path = checkpoint_file(source) or ""
        self._header = read_header(source, self._path)
        self._parts = find_parts(self._header.shapes)
        if not self._parts:
            raise ModelError(
                "it holds no UNet, autoencoder or ControlNet of the Stable Diffusion family",
                where=source.name,
                hint="An adapter (LoRA) or an embedding is not a model: it is added to a pipeline by a transform.",
            )
        check_file(source, self._path)
        self._warn_of_rest()
        if options.ema and self._average("time_embed.0.weight") not in self._header.shapes:
            raise ModelError(
                "it has no averaged weights (model_ema)", where=source.name, hint="Leave out the option ema."
            )
        self.alone = len(self._parts) == 1
        self._folder = Folder(open_file(options.config), None) if options.config else None
        try:
            self._family = self._identify()
            self._configs = {component: self._config(component) for component in self._parts}
        except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # shapes that no model has
            raise ModelError(
                f"its tensors have shapes of no model: {error}", where=source.name, hint=self.misfit
            ) from error
        self.components = {component: part.kind for component, part in self._parts.items()}
        self.index: dict[str, Any] = {}
        self._assets: dict[str, dict[str, bytes]] = {}
        if not self.alone:
            index = self._family.index(self.components)
            self._add_scheduler()
            for component in self._parts:
                if component.startswith("text_encoder"):
                    self._add_tokenizer(component)
            self.index = index if self._folder is None else self._of_folder(self._folder)

    misfit = f"The file is damaged, or of a variety that is not known. {infer.IRREGULAR}"

    def where(self, component: str) -> str:
        """Name a component in messages."""
        return self.name if self.alone else f"{self.name}: {component}"

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config."""
        return self._configs[component]

    def optional(self, component: str, name: str) -> dict[str, Any]:
        """Return a JSON file of the scheduler or a tokenizer, {} if it is not there."""
        path = f"{component}/{name}"
        return parse_object(self._assets.get(component, {}).get(path, b"{}"), path)

    def assets(self, component: str) -> dict[str, bytes]:
        """Return the small files of the scheduler or a tokenizer."""
        return self._assets[component]

    def file(self, path: str) -> bytes | None:
        """Return a small file of the config's folder, None if it is not there."""
        return self._folder.file(path) if self._folder and not self.alone else None

    def weights(self, component: str) -> Callable[[], Tensors]:
        """Return a function that reads a component's weights, and nothing else of the file, in diffusers' naming."""
        return lambda: self._read(component)

    # -- what the file is ---------------------------------------------------------------------------------------

    def _identify(self) -> Family:
        steps = None
        if self._header.shapes.get("global_step") == ():
            steps = int(read_weights(self._source, [self._path], {"global_step": "global_step"}.get)["global_step"])
        family = identify(self._parts, self._header, Path(self._path).name, steps)
        if "edm_mean" in self._header.shapes and self._folder is None:
            raise ModelError(
                "it is a Playground 2.5, whose latents have a mean and a noise schedule of their own",
                where=self.name,
                hint=infer.IRREGULAR,
            )
        prediction = self._options.prediction_type
        if prediction is None and not family.sure and self._folder is None and not self.alone:
            self._say(
                "the file does not say what its UNet predicts: v_prediction is taken, as Stable Diffusion 2 for 768 "
                'pixels has it. Set the option prediction_type to "epsilon" for a model of 512 pixels.'
            )
        if list(self._parts) == ["vae"] and self._folder is None:
            self._say(
                f"an autoencoder does not say its scaling_factor: {family.scaling_factor} is taken, "
                f"that of {'SDXL' if family.xl else 'Stable Diffusion 1 and 2'}, by the file's name. "
                "A folder with its config.json says it."
            )
        return family if prediction is None else replace(family, prediction=prediction, sure=True)

    def _config(self, component: str) -> dict[str, Any]:
        """Return a component's config: the folder's, or what shapes and family say."""
        if self._folder is not None:
            if component not in self._folder.components:
                raise ModelError(
                    f"it has no {component}, which the checkpoint has", where=f"load.config: {self._folder.name}"
                )
            return self._folder.config(component)
        part, shapes, family = self._parts[component], self._header.shapes, self._family
        try:
            if component == "vae":
                return infer.vae_config(part, shapes, scaling_factor=family.scaling_factor, size=family.size)
            if component.startswith("text_encoder"):
                return infer.text_config(part, shapes)
            second = self._parts.get("text_encoder_2")
            width = infer.text_config(second, shapes)["projection_dim"] if second else None
            if component == "controlnet":
                config = infer.controlnet_config(part, shapes, text_width=width)
            else:
                refiner = family.name == "refiner"
                config = infer.unet_config(part, shapes, text_width=width, refiner=refiner, size=family.size // 8)
        except ModelError as error:
            raise ModelError(error.what, where=self.where(component), hint=error.hint) from error
        if infer.guessed(config):
            self._say(
                f"the {component} has sizes of no published model: heads of attention and groups of normalisation are "
                "guessed. The option config = FOLDER, with a diffusers folder's configs, makes them certain."
            )
        return config

    def _warn_of_rest(self) -> None:
        """Say which tensors belong to no submodel, but for what is known to be of training only."""
        prefixes = tuple(part.prefix for part in self._parts.values())
        rest = [name for name in self._header.shapes if not name.startswith(prefixes) and not _TRAINING.match(name)]
        if rest:
            self._say(f"{len(rest)} tensors belong to no submodel and are left out: {', '.join(rest[:3])}...")

    def _say(self, what: str) -> None:
        warnings.warn(f"{self.name}: {what}", stacklevel=6)

    def _of_folder(self, folder: Folder) -> dict[str, Any]:
        """Return the index of the config's folder, without what the checkpoint has not."""
        gone = [name for name in folder.components if name not in self.components]
        if gone:
            self._say(f"the checkpoint has no {', '.join(gone)}, which the option config names")
        return {**folder.index, **{name: [None, None] for name in gone}}

    def _add_scheduler(self) -> None:
        """Make the scheduler's config: the folder's or the family's, under what the file and the options say."""
        if self._folder is None:
            config = self._family.scheduler()
            changes: dict[str, Any] = {}
        else:
            self._assets["scheduler"] = self._folder.assets("scheduler")
            config = self._folder.optional("scheduler", "scheduler_config.json")
            changes = {key: value for key, value in self._family.marks().items() if config.get(key) != value}
            if changes:
                prediction = ", ".join(f"{key} = {str(value).lower()}" for key, value in changes.items())
                self._say(f"the file says {prediction}, and the option config says otherwise: the file counts")
        if self._folder is None or self._options.prediction_type:
            changes["prediction_type"] = self._family.prediction
        if changes:
            config |= changes
            self._assets["scheduler"] = {"scheduler/scheduler_config.json": json.dumps(config, indent=2).encode()}
        self.components = {**self.components, "scheduler": config.get("_class_name", "Scheduler")}

    def _add_tokenizer(self, encoder: str) -> None:
        component = encoder.replace("text_encoder", "tokenizer")
        self.components = {**self.components, component: "CLIPTokenizer"}
        folder = self._options.tokenizer
        if folder is None and self._folder is not None and component in self._folder.components:
            self._assets[component] = self._folder.assets(component)
            return
        config = self._configs[encoder]
        self._assets[component] = tokenizer_files(
            component,
            self._places(component),
            where=self.where(component),
            words=config["vocab_size"],
            length=config["max_position_embeddings"],
            pad=self._family.pad(component),
            path=str(folder) if folder else None,
        )

    def _places(self, component: str) -> list[tuple[Source, str]]:
        """Return where a tokenizer may lie: the option's folder; or in the source, with what is beside it."""
        if folder := self._options.tokenizer:
            source = open_file(folder)
            return [(source, component), (source, "tokenizer"), (source, ".")]
        return [(self._source, component), (self._source, "tokenizer")]

    # -- weights ------------------------------------------------------------------------------------------------

    def _average(self, name: str) -> str:
        """Return where CompVis' training keeps the running average of a weight of the UNet."""
        return "model_ema." + f"diffusion_model.{name}".replace(".", "")

    def _read(self, component: str) -> Tensors:
        part, config = self._parts[component], self._configs[component]
        names = {name: part.prefix + name for name in part.strip(self._header.shapes)}
        if part.naming == "diffusers":
            return read_weights(self._source, [self._path], {stored: name for name, stored in names.items()}.get)
        if self._options.ema and component == "unet":
            names = {name: self._average(name) for name in names}
        wanted = {stored: original_name(part, name, config) for name, stored in names.items()}
        tensors = read_weights(self._source, [self._path], wanted.get)
        try:
            return to_diffusers(part, tensors, config)
        except ModelError as error:
            raise ModelError(error.what, where=self.where(component), hint=self.misfit) from error
