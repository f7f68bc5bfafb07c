"""What the tasks ask of an architecture: facts of a model, and functions over arrays. One module describes a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.errors import ModelError
from ovforge.model import Timings
from ovforge.store import parse_object
from ovforge_diffusion.residuals import BLOCK, CONTROLNETS, block_residuals, check_class
from ovforge_diffusion.scale import Scale
from ovforge_diffusion.tokenizer import Learned

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionInputs, DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = [
    "PREVIEW",
    "Architecture",
    "Arrays",
    "Condition",
    "Defaults",
    "OpenEncoder",
    "PromptEncoder",
    "Task",
    "Texts",
    "tokenizer_of",
]

Array = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
"""Values by the name of the denoiser's input."""

Task = Literal["text-to-image", "image-to-image", "inpainting", "text-to-video", "image-to-video", "video-to-video"]
Texts = tuple[str, ...]
"""What a picture's prompt is to each text encoder."""

PREVIEW = "preview_decoder"
"""Role of a small decoder, such as TAESD's, that makes the previews."""

_STATISTICS = ("bn_running_mean_data", "bn_running_var_data", "bn_eps", "latents_mean_data", "latents_std_data")
"""What configs of decoders say of latents that are normalized."""

OpenEncoder = Callable[[str], tuple[Any, ov.CompiledModel, Learned | None]]
"""Returns a text encoder's tokenizer, its compiled model, and the words that it was taught, by its role.

The tokenizer is a `Tokenizer` of CLIP, or a `SequenceTokenizer` for an architecture's `sequence_encoders`."""


@dataclass(frozen=True)
class Defaults:
    """What a call takes if it does not say."""

    steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.8


@dataclass(frozen=True)
class Condition:
    """What a ControlNet is to be shown. Pictures are float32 (channels, height, width), of the size that is made."""

    role: str
    mode: int | None
    pixels: Array
    """From 0 to 1."""

    mask: Array | None
    """1 for each pixel that is painted anew, 0 for the others."""

    around: Array | None
    """A picture that the mask is for, from 0 to 1."""

    pictures: int
    drawn: Callable[[Array], Array]
    """Returns latents of pixels from -1 to 1 for each picture that is made, drawn from the run's random numbers."""

    likeliest: Callable[[Array], Array]
    """Returns the same without drawing."""

    def each(self, value: Array) -> Array:
        """Return a row of a value for each picture that is made."""
        return np.repeat(value[None], self.pictures, axis=0)


class PromptEncoder(ABC):
    """Turns prompts into what conditions the denoiser."""

    @abstractmethod
    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return the denoiser's inputs by name, each with a row for each prompt, and warnings of what did not fit.

        `negative` says which of the texts are to be avoided.
        """

    def learned(self, texts: Sequence[Texts]) -> list[list[str]]:
        """Return the words beyond the tokenizers' own that each prompt used."""
        return [[] for _ in texts]


class Architecture(ABC):
    """A kind of model, and one model of that kind. Sizes are those of latents where nothing else is said."""

    name: ClassVar[str]
    """What people call the family."""

    tasks: ClassVar[tuple[Task, ...]] = ("text-to-image", "image-to-image", "inpainting")
    """What models of the family can do."""

    makes_videos: ClassVar[bool] = False
    """Whether it makes videos: sizes are then (frames, height, width), and latents have an axis more."""

    denoiser: ClassVar[str] = "transformer"
    """Role of the network that predicts."""

    sample: ClassVar[str] = "hidden_states"
    """Its input for the latents."""

    channel_axis: ClassVar[int] = 1
    """Axis of channels in what it takes and gives."""

    timestep_rows: ClassVar[bool] = True
    """Whether it takes the timestep once for each row, rather than once for all."""

    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    """Roles of text encoders that it may have."""

    sequence_encoders: ClassVar[tuple[str, ...]] = ()
    """Those of them that are not a CLIP: their tokenizers are those of tokenizer.json."""

    default_size: ClassVar[int] = 64
    """Side of latents if the config does not say."""

    latent_scale: ClassVar[tuple[float, float] | None] = None
    """Factor and shift of latents, for an autoencoder whose file does not tell them; None if the family has several."""

    noise_at_full_strength: ClassVar[bool] = True
    """Whether inpainting at strength 1 begins with noise alone, rather than with a picture noised by the scheduler."""

    prompts: int = 1
    """How many different prompts a picture can have: one for each text encoder."""

    negatives: bool = True
    """Whether it can follow one prompt and avoid another at all."""

    guidance_measure: float = 1.0
    """What a guidance scale of 1 is to a denoiser that takes the scale itself, as its input `guidance`."""

    guided_by: ClassVar[str] = "guidance_scale"
    """The input that switches classifier-free guidance on."""

    zero_negative: bool = False
    """Whether no negative prompt means zeros, rather than the states of an empty one."""

    masked: bool = False
    """Whether the denoiser takes a mask and a masked picture beside the latents."""

    layers: int = 0
    """How many layers the denoiser has that can be left out, for skip-layer guidance."""

    length: int | None = None
    """Tokens that the longest text encoder reads by default, where a call can say it; else None."""

    longest_side: int | None = None
    """Pixels a side that it has places for; None if there is no limit."""

    rounds_sizes: ClassVar[bool] = False
    """Whether sides that do not fit are rounded down, as diffusers' pipeline does, rather than refused."""

    keeps_norm: ClassVar[bool] = False
    """Whether guided predictions are scaled to the norm, along the last axis, of those with the prompt."""

    guidance_options: ClassVar[tuple[str, ...]] = ()
    """Inputs that say how guidance acts, and count for this family alone: cfg_normalization, cfg_truncation."""

    size_options: tuple[str, ...] = ()
    """Inputs that tell the denoiser of sizes and scores: those of Stable Diffusion XL that count for this model."""

    given_channels: int | None = None
    """Channels that the denoiser gives, if it gives more than those of the latents, which come first."""

    shifts_latents: ClassVar[bool] = True
    """Whether the autoencoder's shift_factor counts in diffusers' pipelines for the family."""

    normalizes_latents: ClassVar[bool] = False
    """Whether its latents_mean and latents_std count there."""

    instructed: ClassVar[bool] = False
    """Whether a language model is told something before each prompt that is followed."""

    bins: int | None = None
    """Pixels a side of the square in the list of sizes that the model was trained on; None if there is no list."""

    controlnets: tuple[str, ...] = ()
    """Roles of the pipeline's ControlNets."""

    encodes_conditions: bool = False
    """Whether its ControlNets take latents of their pictures."""

    controls_prompt: ClassVar[bool] = False
    """Whether ControlNets see the half with the prompt alone, and what they give goes to all halves."""

    several_conditions: ClassVar[bool] = False
    """Whether one ControlNet may get several conditions."""

    stacks_condition: bool = False
    """Whether the denoiser itself takes latents of a condition, as channels beside its own."""

    overriding: ClassVar[str] = "as diffusers' pipeline reads it"
    """Why `overrides` changes a scheduler's config."""

    folding: ClassVar[int] = 1
    """How many of the autoencoder's latents a side are one of the denoiser's, with so many times the channels."""

    image_encoders: tuple[str, ...] = ()
    """Roles of what sees pictures for the text encoders."""

    references: int = 0
    """How many pictures image-to-image shows to the denoiser beside the latents; 0 if it noises one instead.

    1 means one for each prompt, more that all of them are shown with each prompt."""

    draws_references: ClassVar[bool] = False
    """Whether the latents of a picture that is painted in are drawn, where the denoiser sees it, too."""

    def __init__(self, context: TaskContext, task: Task) -> None:
        if task not in self.tasks:
            ways = {
                "text-to-image": "text",
                "image-to-image": "a picture",
                "inpainting": "a masked picture",
                "text-to-video": "text",
                "image-to-video": "the first frame",
                "video-to-video": "other videos",
            }
            made = "videos" if self.makes_videos else "pictures"
            raise ModelError(
                f"{self.name} makes {made} from {' or '.join(ways[known] for known in self.tasks)} alone",
                where=f"{self.denoiser}/config.json",
                hint=f"Set task = {' or '.join(repr(known) for known in self.tasks)}, or take another family.",
            )
        bundle = context.bundle
        vae = bundle.configs.get("vae_decoder", {})
        self.config: Mapping[str, Any] = bundle.configs.get(self.denoiser, {})
        self.configs = bundle.configs
        self.controlnets = tuple(role for role in CONTROLNETS if role in bundle)
        for role in self.controlnets:
            check_class(role, bundle.configs.get(role, {}), self.denoiser, self.config)
        for role in ("vae_decoder", "vae_encoder", PREVIEW):
            if role in bundle:
                _check_autoencoder(role, bundle.configs.get(role, {}), vae)
        self.task = task
        self.pipeline_class = str(bundle.index.get("_class_name"))
        widths = ("block_out_channels", "decoder_block_out_channels", "dim_mult")
        levels = len(next((vae[name] for name in widths if vae.get(name)), (0,) * 4))
        self.factor: int = 2 ** (levels - 1) * self.folding
        """Pixels for each latent."""

        self.multiple: int = self.factor
        """Pixels that sides are multiples of."""

        self.latent_channels = int(vae.get("latent_channels", vae.get("z_dim", 4))) * self.folding**2
        self.channels = int(self.config.get("in_channels", self.latent_channels))
        """Of the denoiser's input."""

        self.encoders = tuple(role for role in self.text_encoders if role in bundle)
        if not self.encoders:
            raise ModelError(
                "the model has no text encoder",
                where="text_encoder",
                hint="Bring one, with its tokenizer, by [load.parts]: text_encoder = FOLDER and tokenizer = FOLDER, "
                "where FOLDER is a converted model of the same family.",
            )
        encoder = bundle.configs.get("vae_encoder", vae)
        if encoder.get("_class_name") == vae.get("_class_name"):  # optimum-intel tells statistics to the decoder alone
            encoder = {**{name: vae[name] for name in _STATISTICS if name in vae}, **encoder}
        self.encoding = self._counting(Scale.of(encoder, self.latent_scale))
        self.decoding = self._counting(Scale.of(vae, self.latent_scale))
        preview = Scale.of(bundle.configs.get(PREVIEW, {}), self.latent_scale) if PREVIEW in bundle else None
        self.previewing = preview and self._counting(preview)
        """Of the decoder for previews; None if there is none of its own."""

        self.train_timesteps = int(bundle.scheduler_config().get("num_train_timesteps", 1000))
        size = self.config.get("sample_size") or self.default_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.sides: tuple[int, int] = int(width) * self.factor, int(height) * self.factor
        """(width, height) in pixels of the pictures that the model was trained on."""

        self.defaults = self.own_defaults(context, self.usual(task))

    def _counting(self, scale: Scale) -> Scale:
        """Return what of an autoencoder's scale diffusers' pipelines for the family look at."""
        scale = scale if self.shifts_latents else replace(scale, shift=0.0)
        return scale if self.normalizes_latents else replace(scale, mean=None, deviation=None)

    def check_channels(self, expected: int | None = None) -> None:
        """Raise ModelError for a denoiser of other channels than `expected`, by default those of the latents."""
        expected = self.latent_channels if expected is None else expected
        if self.channels != expected:
            raise ModelError(
                f"a {self.denoiser} with {self.channels} input channels does not fit latents of {self.latent_channels}",
                where=f"{self.denoiser}/config.json",
                hint=f"Expected {expected}: take the autoencoder of the same model.",
            )

    def own_defaults(self, context: TaskContext, usual: Defaults) -> Defaults:
        """Return the defaults of a family, with what the model's own ovforge.json says in their place."""
        own = parse_object(context.bundle.assets.get("ovforge.json", b"{}"), "ovforge.json").get("defaults", {})
        given = checked(_Own, own, where="ovforge.json: defaults").model_dump(exclude_unset=True)
        return Defaults(**{**vars(usual), **given})

    @classmethod
    @abstractmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """Say from the configs whether a model that has the denoiser's role is of this kind."""

    @abstractmethod
    def usual(self, task: Task) -> Defaults:
        """Return the defaults of diffusers' pipeline for a task."""

    # -- prompts and guidance -------------------------------------------------------------------------------------

    @abstractmethod
    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return what encodes prompts."""

    def guidance(self, inputs: DiffusionInputs, scale: float) -> float | None:
        """Return by how much predictions are guided from one half to the other; None if there is one half.

        `scale` is the call's guidance_scale, or the default. Raises InputError for what would have no effect.
        """
        return scale if scale > 1 else None

    def remarks(self, request: Request) -> list[str]:
        """Return warnings about a call: what of it has no effect with this model."""
        return []

    # -- what the denoiser takes ----------------------------------------------------------------------------------

    def sample_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of what the denoiser takes of pictures of a size in latents."""
        return (pictures, self.channels, height, width)

    def packed_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of packed latents of pictures of a size in latents."""
        return (pictures, self.latent_channels, height, width)

    def pack(self, latents: Array) -> Array:
        """Return latents, (pictures, channels, height, width), as the denoiser and the scheduler see them."""
        return latents

    def unpack(self, latents: Array, height: int, width: int) -> Array:
        """Return packed latents as (pictures, channels, height, width), of a size in latents."""
        return latents

    def masked_extra(self, mask: Array, hidden: Array) -> Array:
        """Return what a denoiser for inpainting takes beside the latents, packed.

        `mask` is (pictures, 1, height, width) in pixels, 1 where a picture is painted anew, and `hidden` are latents of
        the picture without that part.
        """
        return np.concatenate([mask[:, :, :: self.factor, :: self.factor], hidden], axis=1)

    def kept(self, mask: Array) -> Array:
        """Return how far each latent is painted anew, from 0 to 1, (1, height, width), by a mask in pixels."""
        return mask[:, :: self.factor, :: self.factor]

    def limited(self, image: Image.Image) -> Image.Image:
        """Return a picture to paint in, of no more pixels than the model takes if a call does not say the size."""
        return image

    def shown(self, image: Image.Image) -> Image.Image:
        """Return a picture as the denoiser is to see it: of a size that it can have."""
        return image

    def size_beside(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Return the (width, height) that is made beside pictures shown so large; None for the model's own."""
        return None

    def beside(self, references: Sequence[Array]) -> Array:
        """Return what the denoiser takes beside the latents, packed: `references` are (pictures, channels, h, w)."""
        return np.concatenate([self.pack(latents) for latents in references], axis=1)

    def widened(self, shape: tuple[int, ...], references: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Return a `sample_shape` with what stands beside the latents, of (height, width) in latents."""
        tokens = sum(self.packed_shape(1, *size)[1] for size in references)
        return (shape[0], shape[1] + tokens, *shape[2:])

    def guidance_end(self, stop: float, steps: int) -> int:
        """Return the step, of so many, at which guidance ends after a part of them, as diffusers' guiders count it."""
        return int(stop * steps)

    def timestep(self, timestep: float) -> float:
        """Return what the denoiser is told of a timestep."""
        return timestep

    def predicted(self, output: Array) -> Array:
        """Return what the scheduler is told of the guided output."""
        return output

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return inputs that hold for a whole run: with a row for each picture of each half, and shared by all rows."""
        return {}, {}

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of all of the denoiser's inputs for a batch of `rows`; None if the configs do not tell.

        `size` is (height, width) in latents, of videos (frames, height, width); `inputs` is what the pipeline's config
        says of a call, unchecked.
        """
        return None

    def foreseen_frames(self, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the frames, in latents, of calls that the pipeline's config foresees: () for pictures.

        None if the config says no number of them.
        """
        return ()

    def kept_shape(self, rows: int, size: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Return the shape of what step-cache keeps, of so many channels, for the same fixed shapes."""
        return (rows, channels, *size)

    def control_shapes(
        self, role: str, denoiser: Mapping[str, tuple[int, ...]], pixels: tuple[int, int]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of a ControlNet's inputs, beside a denoiser of fixed ones; `pixels`: height, width."""
        return None

    def foreseen_halves(self, inputs: Mapping[str, Any]) -> int:
        """Return how many halves calls will have, by what the pipeline's config says of one, unchecked."""
        scale = inputs.get("guidance_scale", self.defaults.guidance_scale)
        return 1 if not self.negatives or (isinstance(scale, int | float) and scale <= 1) else 2

    @property
    def size(self) -> int:
        """Pixels of the longer side of the pictures that the model was trained on."""
        return max(self.sides)

    @property
    def grid(self) -> int:
        """Pixels that the denoiser itself wants of sides, for models that were converted without free sizes."""
        return self.multiple

    # -- ControlNets ----------------------------------------------------------------------------------------------

    @property
    def denoiser_name(self) -> str:
        """What people call the network that predicts."""
        return "UNet" if self.denoiser == "unet" else self.denoiser

    def refuse_controlnets(self, why: str) -> None:
        """Raise ModelError if the pipeline has a ControlNet."""
        if self.controlnets:
            raise ModelError(why, where=self.controlnets[0], hint="Leave it out of [load.parts].")

    def conditioned(self, count: int) -> tuple[str, ...]:
        """Return the role of the ControlNet that gets each of so many conditions, or of a denoiser that takes one."""
        if self.stacks_condition:
            return (self.denoiser,)
        several = len(self.controlnets) == 1 and self.several_conditions
        return self.controlnets * count if several else self.controlnets

    def modes(self, role: str) -> int | None:
        """Return how many kinds of conditions a ControlNet is for; None if it does not ask which one it gets."""
        modes: int | None = self.configs.get(role, {}).get("num_mode")
        return modes

    def paints(self, role: str) -> bool:
        """Say whether a ControlNet is for inpainting, and takes a mask."""
        config = self.configs.get(role, {})
        return bool(config.get("extra_conditioning_channels") or config.get("extra_condition_channels"))

    def paints_around(self, role: str) -> bool:
        """Say whether a ControlNet may get a mask, and the picture that it is for, beside its condition."""
        return False

    def condition(self, given: Condition, request: Request) -> dict[str, NDArray[Any]]:
        """Return a ControlNet's own inputs, with a row for each picture: over what it shares with the denoiser."""
        return {"controlnet_cond": given.each(given.pixels)}

    def residuals(self, role: str, outputs: Iterable[str]) -> dict[str, str]:
        """Return the denoiser's input -> the ControlNet's output that is added there."""
        taken = block_residuals(self.configs[role], self.config)
        return {f"{BLOCK}{block}": output for block, output in taken.items()}

    def painted(self, given: Condition) -> Array:
        """Return latents of what stays of a condition, and 1 where it does: (pictures, channels + 1, height, width)."""
        assert given.mask is not None
        pixels = np.where(given.mask > 0.5, np.float32(-1), given.pixels * np.float32(2) - np.float32(1))
        kept = np.float32(1) - self.kept(given.mask)
        return np.concatenate([given.likeliest(pixels), given.each(kept)], axis=1)

    # -- the schedule ---------------------------------------------------------------------------------------------

    def overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return what of the model's scheduler config diffusers' pipeline for this model would change."""
        return {}

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run, or the part of one that `strength` says; `size` is (height, width) in latents."""
        return scheduler.start(steps, strength)

    def notes(self) -> list[str]:
        """Return what plans and results should say of this model."""
        said = Scale.of(self.configs.get("vae_decoder", {}), self.latent_scale)
        notes = []
        if "PAG" in self.pipeline_class:
            notes.append(
                f"model_index.json names {self.pipeline_class}, and guidance by perturbed attention is not there: "
                "pictures are those of pag_scale = 0"
            )
        if self.decoding.mean and self.decoding.deviation:
            notes.append("the autoencoder's latents_mean and latents_std are applied")
        elif said.mean and said.deviation:
            notes.append("the autoencoder's latents_mean and latents_std do not count, as in diffusers' pipeline")
        if said.shift and not self.shifts_latents:
            notes.append("the autoencoder's shift_factor does not count, as in diffusers' pipeline")
        return notes


class _Own(BaseModel):
    """What a model may say of itself in ovforge.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(50, ge=1, le=100_000)
    guidance_scale: float = Field(7.5, ge=0)


def tokenizer_of(encoder: str) -> str:
    """Return the role of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def _check_autoencoder(role: str, config: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    """Raise ModelError for another kind of model, or for latents of other channels than the decoder's."""
    kind = str(config.get("_class_name") or "Autoencoder")
    if "Autoencoder" not in kind:
        raise ModelError(
            f"it is a {kind}, which makes no pictures of latents", where=f"{role}/config.json",
            hint=f"Name an autoencoder in [load.parts]: {role} = FOLDER.",
        )  # fmt: skip
    given, wanted = (each.get("latent_channels", each.get("z_dim")) for each in (config, decoder))
    if given is not None and wanted is not None and given != wanted:
        raise ModelError(
            f"it has latents of {given} channels, and the model's decoder has {wanted}", where=f"{role}/config.json",
            hint="Take one that was made for the same family.",
        )  # fmt: skip
