"""A single file with a diffusion transformer, seen as a diffusers folder: safetensors of any float type, or GGUF."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ovforge import open_file
from ovforge.errors import ConfigError, ModelError
from ovforge.model import Source
from ovforge_diffusers import infer
from ovforge_diffusers.folder import Folder
from ovforge_diffusers.gguf_file import read_gguf_header
from ovforge_diffusers.header import Part, Shapes, checkpoint_file, read_header
from ovforge_diffusers.naming import original_name, to_diffusers
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.stored import SCALES, joined, read_gguf, read_scaled
from ovforge_diffusers.transformer_configs import ZERO_TIMESTEP, scheduler_config, transformer_config
from ovforge_diffusers.transformer_names import diffusers_rows
from ovforge_diffusers.weights import check_file, read_weights

__all__ = ["TransformerCheckpoint", "find_transformer", "is_gguf", "tensor_shapes"]

GGUF_SUFFIX = ".gguf"

_FORMS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "FluxTransformer2DModel",
        "original",
        ("model.diffusion_model.", ""),
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight", "txt_in.weight"),
    ),
    (
        "FluxTransformer2DModel",
        "diffusers",
        ("", "transformer."),
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
    ),
    (
        "SD3Transformer2DModel",
        "original",
        ("model.diffusion_model.", ""),
        ("joint_blocks.0.context_block.attn.qkv.weight", "y_embedder.mlp.0.weight", "pos_embed"),
    ),
    (
        "SD3Transformer2DModel",
        "diffusers",
        ("", "transformer."),
        ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.pos_embed", "norm_out.linear.weight"),
    ),
    (
        "QwenImageTransformer2DModel",
        "diffusers",
        ("model.diffusion_model.", "", "transformer."),
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight", "proj_out.weight"),
    ),
)
"""Class, naming, possible prefixes, and names that tell."""

_VAES = ("first_stage_model.", "vae.")
_BESIDE = re.compile(rf"scaled_fp8$|.*\.(scale_input|input_scale)$|{ZERO_TIMESTEP}$")
"""What float8 files hold for programs that compute in float8, and marks of ComfyUI."""


@dataclass(frozen=True, slots=True)
class _Latents:
    """Facts of an autoencoder that its tensors do not tell."""

    pipeline: str
    scaling_factor: float
    shift_factor: float


_LATENTS = {
    "FluxTransformer2DModel": _Latents("FluxPipeline", 0.3611, 0.1159),
    "SD3Transformer2DModel": _Latents("StableDiffusion3Pipeline", 1.5305, 0.0609),
    "QwenImageTransformer2DModel": _Latents("QwenImagePipeline", 1.0, 0.0),
}


def is_gguf(path: str) -> bool:
    """Say whether a file is GGUF, by its name."""
    return PurePosixPath(path).suffix == GGUF_SUFFIX


def tensor_shapes(source: Source, path: str) -> Shapes:
    """Return the shapes of a checkpoint's tensors. Raises ModelError for a file that is damaged."""
    if is_gguf(path):
        return {name: entry.shape for name, entry in read_gguf_header(source, path).tensors.items()}
    return read_header(source, path).shapes


def find_transformer(shapes: Shapes) -> Part | None:
    """Return the diffusion transformer among a checkpoint's tensors, None if there is none."""
    for kind, naming, prefixes, marks in _FORMS:
        for prefix in prefixes:
            if all(prefix + mark in shapes for mark in marks):
                return Part(kind, prefix, naming)
    return None


class TransformerCheckpoint:
    """A file of a transformer, alone or with its autoencoder, in its makers' names or in diffusers'.

    Configs are those of `options.config`, a diffusers folder, or inferred from shapes. Raises ModelError for a file
    that is damaged or of another kind, ConfigError for an option that it has no use for.
    """

    misfit = "The file is damaged, or of a variety that is not known."

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        self.name = source.name
        self.protected = source.protection is not None
        for option in ("tokenizer", "prediction_type", "ema"):
            if getattr(options, option):
                raise ConfigError("is for checkpoints of Stable Diffusion 1, 2 and XL", where=f"load.{option}")
        self._source = source
        self._path = checkpoint_file(source) or ""
        if not is_gguf(self._path):
            check_file(source, self._path)
        shapes = tensor_shapes(source, self._path)
        part = find_transformer(shapes)
        if part is None:
            raise ModelError("it holds no diffusion transformer that is known", where=source.name)
        self._part, self._vae = part, _find_vae(shapes)
        self.alone = self._vae is None
        self._own = {n: s for n, s in part.strip(shapes).items() if not n.endswith(SCALES) and not _BESIDE.match(n)}
        if part.prefix == "":
            others = (*_VAES, "text_encoders.")
            self._own = {name: shape for name, shape in self._own.items() if not name.startswith(others)}
        self._rows = None if part.naming == "diffusers" else self._renamed()
        self._folder = Folder(open_file(options.config), None) if options.config else None
        self.components = {"transformer": part.kind, **({"vae": "AutoencoderKL"} if self._vae else {})}
        self._configs = {component: self._config(component, shapes) for component in self.components}
        self._warn_of_rest(shapes)
        scheduler = scheduler_config(part.kind, self._configs["transformer"])
        if self._folder and "scheduler" in self._folder.components:
            scheduler = self._folder.optional("scheduler", "scheduler_config.json")
        self._scheduler = scheduler
        self.components["scheduler"] = str(scheduler["_class_name"])
        self.index = {
            "_class_name": _LATENTS[part.kind].pipeline,
            **{name: ["diffusers", kind] for name, kind in self.components.items()},
        }

    def where(self, component: str) -> str:
        """Name a component in messages."""
        return self.name if self.alone else f"{self.name}: {component}"

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config."""
        return self._configs[component]

    def optional(self, component: str, name: str) -> dict[str, Any]:
        """Return the scheduler's config; {} for what a file does not hold."""
        return self._scheduler if component == "scheduler" else {}

    def assets(self, component: str) -> dict[str, bytes]:
        """Return the scheduler's config."""
        return {"scheduler/scheduler_config.json": json.dumps(self._scheduler, indent=2).encode()}

    def file(self, path: str) -> bytes | None:
        """Return None: there is nothing beside the file."""
        return None

    def weights(self, component: str) -> Callable[[], Mapping[str, Any]]:
        """Return a function that reads a component's weights, in diffusers' naming."""
        return self._read_vae if component == "vae" else self._read

    def _read(self) -> Mapping[str, Any]:
        names = {self._part.prefix + name: name for name in self._own}
        read = read_gguf if is_gguf(self._path) else read_scaled
        weights = read(self._source, self._path, names)
        return weights if self._rows is None else joined(weights, self._rows)

    def _read_vae(self) -> Mapping[str, Any]:
        part, config = self._vae, self._configs["vae"]
        assert part is not None  # the component is there only then
        names = {
            part.prefix + name: original_name(part, name, config)
            for name in part.strip(tensor_shapes(self._source, self._path))
        }
        tensors = read_weights(self._source, [self._path], names.get)
        try:
            return to_diffusers(part, tensors, config)
        except ModelError as error:
            raise ModelError(error.what, where=self.where("vae"), hint=self.misfit) from error

    def _renamed(self) -> dict[str, list[tuple[str, int, int]]]:
        try:
            return diffusers_rows(self._part.kind, self._own)
        except ModelError as error:
            raise ModelError(error.what, where=self.name, hint=self.misfit) from error

    def _config(self, component: str, shapes: Shapes) -> dict[str, Any]:
        if self._folder is not None and component in self._folder.components:
            return self._folder.config(component)
        latents = _LATENTS[self._part.kind]
        try:
            if component == "vae" and self._vae is not None:
                config = infer.vae_config(self._vae, shapes, scaling_factor=latents.scaling_factor, size=1024)
                return config | {"shift_factor": latents.shift_factor}
            own = self._own
            if self._rows is not None:
                own = {
                    new: (sum(end - begin for _, begin, end in slices), *self._own[slices[0][0]][1:])
                    for new, slices in self._rows.items()
                }
            marks = {name: () for name in (ZERO_TIMESTEP,) if self._part.prefix + name in shapes}
            return transformer_config(self._part.kind, {**own, **marks})
        except (ModelError, LookupError, ValueError, TypeError, ArithmeticError) as error:  # shapes that no model has
            what = error.what if isinstance(error, ModelError) else f"its tensors have shapes of no model: {error}"
            raise ModelError(what, where=self.where(component), hint=self.misfit) from error

    def _warn_of_rest(self, shapes: Shapes) -> None:
        """Say which tensors belong to no submodel."""
        known = {self._part.prefix + name for name in self._own}
        prefix = self._vae.prefix if self._vae else None
        rest = [
            name
            for name in shapes
            if name not in known
            and not (prefix and name.startswith(prefix))
            and not name.endswith(SCALES)
            and not _BESIDE.match(name)
        ]
        if rest:
            warnings.warn(
                f"{self.name}: {len(rest)} tensors belong to no submodel and are left out: {', '.join(rest[:3])}... "
                "Text encoders come from another model: [load.parts]",
                stacklevel=6,
            )


def _find_vae(shapes: Shapes) -> Part | None:
    for prefix in _VAES:
        if prefix + "decoder.conv_in.weight" in shapes and prefix + "encoder.down.0.block.0.conv1.weight" in shapes:
            return Part("AutoencoderKL", prefix, "original")
    return None
