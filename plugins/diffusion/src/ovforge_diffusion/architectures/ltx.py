"""LTX-Video (HaCohen et al. 2024): one token for each latent of a video, T5, and places in seconds and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, Sampling, Scheduler, TaskContext
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.architectures.flow import begin_flow, sequence_length
from ovforge_diffusion.graph.video_places import PLACES
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, SequenceTokenizer, stacked

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["LTXAutoencoder", "LTXVideo"]

Array = NDArray[np.float32]

_T5 = "text_encoder"


@dataclass(frozen=True)
class LTXAutoencoder:
    """Facts of LTX-Video's autoencoder: pixels a side and frames of a latent, channels, and whether it is told a time.

    Its decoder then takes the last noise out itself.
    """

    factor: int
    frame_factor: int
    channels: int
    denoises_last: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LTXAutoencoder:
        """Read its config.json. Defaults are those of its class."""
        scalings = sum(config.get("spatio_temporal_scaling", (True, True, True, False)))
        return cls(
            factor=int(config.get("spatial_compression_ratio") or config.get("patch_size", 4) * 2**scalings),
            frame_factor=int(config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * 2**scalings),
            channels=int(config.get("latent_channels", 128)),
            denoises_last=bool(config.get("timestep_conditioning")),
        )


class LTXVideo(Architecture):
    """LTX-Video 0.9.0 to 0.9.8, from text, from text and the first frame, or from text, pictures and videos."""

    name = "LTX-Video"
    tasks: ClassVar[tuple[Task, ...]] = ("text-to-video", "image-to-video", "video-to-video")
    makes_videos = True
    shifts_latents = False
    normalizes_latents = True
    channel_axis = 2
    length: int
    overriding = "because video-to-video was made for schedules without a shift"
    text_encoders = (_T5,)
    sequence_encoders = (_T5,)

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.autoencoder = LTXAutoencoder.of(context.bundle.configs.get("vae_decoder", {}))
        self.factor, self.frame_factor = self.autoencoder.factor, self.autoencoder.frame_factor
        self.latent_channels = self.autoencoder.channels
        self.multiple = self.factor
        self.sides = (704, 512)
        self.length = 256 if self._conditioned else 128
        self.check_channels()

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A LTXVideoTransformer3DModel."""
        return bundle.configs.get(cls.denoiser, {}).get("_class_name") == "LTXVideoTransformer3DModel"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of LTXPipeline, LTXImageToVideoPipeline and LTXConditionPipeline."""
        return Defaults(50, 3.0)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return T5. It reads what fills up a prompt, too, but not in video-to-video."""
        tokenizer, model, _ = opened(_T5)
        encoder = SequenceEncoder(tokenizer, model, _T5)
        return _Prompts(
            tokenizer, encoder, self.length, padded=not self._conditioned, weighted=options.prompts == "weighted"
        )

    def sample_shape(self, pictures: int, *size: int) -> tuple[int, ...]:
        """Return (videos, tokens, channels) of a size (frames, height, width) in latents."""
        return (pictures, int(np.prod(size)), self.channels)

    def packed_shape(self, pictures: int, *size: int) -> tuple[int, ...]:
        """Return the same."""
        return self.sample_shape(pictures, *size)

    def pack(self, latents: Array) -> Array:
        """Return a token for each latent of (videos, channels, frames, height, width)."""
        return np.ascontiguousarray(latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1))

    def unpack(self, latents: Array, *size: int) -> Array:
        """Return (videos, channels, frames, height, width) again."""
        return np.ascontiguousarray(latents.transpose(0, 2, 1)).reshape(len(latents), -1, *size)

    def frames(self, count: int) -> int:
        """Return how many latents one after the other are so many frames: the first stands for one alone."""
        return (count - 1) // self.frame_factor + 1

    def foreseen_frames(self, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the same of calls that the config foresees; None if it does not say a number.

        Conditions bring tokens of their own, of which nobody knows how many before their files are read; and `upscale`
        makes two sizes.
        """
        if inputs.get("conditions") or inputs.get("upscale") is not None:
            return None
        count = inputs.get("num_frames", 161)
        return (self.frames(count),) if isinstance(count, int) and count > 0 else None

    def constants(self, request: Request, halves: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the sides of a video in latents, and what one latent is in seconds and pixels.

        In video-to-video each token is told its own place, which hangs on the conditions: see `places`.
        """
        assert request.video is not None
        if self._conditioned:
            return {}, {}
        sides = {
            "num_frames": self.frames(request.video.frames),
            "height": request.height // self.factor,
            "width": request.width // self.factor,
        }
        scale = (self.frame_factor / request.video.rate, self.factor, self.factor)
        held: dict[str, NDArray[Any]] = {name: np.array(side) for name, side in sides.items()}
        return {}, {**held, "rope_interpolation_scale": np.array(scale, np.float32)}

    def places(self, size: tuple[int, ...], rate: float, frame: int = 0) -> Array:
        """Return seconds, rows and columns of each latent of a video, float32 (3, tokens).

        `size` is (frames, height, width) in latents, and `frame` the one of another video that it begins at.
        """
        frames, rows, columns = (
            axis.reshape(-1) for axis in np.meshgrid(*(np.arange(side) for side in size), indexing="ij")
        )
        begins = np.maximum(frames * self.frame_factor + 1 - self.frame_factor, 0) + frame
        places = np.stack([begins, rows * self.factor, columns * self.factor]).astype(np.float32)
        places[0] *= np.float32(1 / rate)
        return places

    def input_shapes(
        self, rows: int, size: tuple[int, ...], options: DiffusionOptions, inputs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes for a size (frames, height, width).

        That of the timestep stays open: it has one axis or two, by who converted the model.
        """
        tokens, width = int(np.prod(size)), self.config.get("caption_channels", 4096)
        length = inputs.get("max_sequence_length") or self.length
        return {
            "hidden_states": (rows, tokens, self.channels),
            "encoder_hidden_states": (rows, length, width),
            "encoder_attention_mask": (rows, length),
            **({PLACES: (3, tokens)} if self._conditioned else {}),
        }

    def kept_shape(self, rows: int, size: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Return (rows, tokens, channels)."""
        return (rows, int(np.prod(size)), channels)

    def sampling(self, scheduler: Scheduler, steps: int, strength: float, size: tuple[int, ...]) -> Sampling:
        """Begin a run of evenly spread levels, shifted by the number of the video's tokens.

        In video-to-video they are spread for that, and not shifted.
        """
        sigmas = linear_quadratic(steps) if self._conditioned else np.linspace(1.0, 1 / steps, steps).tolist()
        return begin_flow(scheduler, steps, strength, tokens=int(np.prod(size)), sigmas=sigmas)

    def overrides(self, config: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        """Return for video-to-video what keeps the shifts of the first versions out, which it was not made for."""
        if not (own and self._conditioned and config.get("use_dynamic_shifting")):
            return {}
        return {"use_dynamic_shifting": False, "shift_terminal": None}

    def notes(self) -> list[str]:
        """Return nothing: every model of the family has statistics of latents."""
        return []

    @property
    def _conditioned(self) -> bool:
        """Whether the task is that of LTXConditionPipeline."""
        return self.task == "video-to-video"


def linear_quadratic(steps: int, threshold: float = 0.025) -> list[float]:
    """Return levels of noise of so many steps: half of them down by `threshold`, the rest by a parabola.

    Source: LTX-Video's own rf.py, as diffusers' linear_quadratic_schedule computes it.
    """
    if steps < 2:
        return [1.0]
    linear = steps // 2
    rest, left = steps - linear, linear - threshold * steps
    square = left / (linear * rest**2)
    slope = threshold / linear - 2 * left / rest**2
    down = [n * threshold / linear for n in range(linear)]
    down += [square * n**2 + slope * n + square * linear**2 for n in range(linear, steps)]
    return [1.0 - each for each in down]


class _Prompts(PromptEncoder):
    """T5's states of each prompt, filled up to `length` by default, and which of them the transformer sees.

    `padded` says whether T5 itself sees what fills up.
    """

    def __init__(
        self, tokenizer: SequenceTokenizer, encoder: SequenceEncoder, length: int, *, padded: bool, weighted: bool
    ) -> None:
        self._tokenizer, self._encoder, self._weighted = tokenizer, encoder, weighted
        self._length, self._padded = length, padded

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, length, width), and 1 for each that counts, (prompts, length)."""
        length = sequence_length(request.given.max_sequence_length, self._length)
        words, lost = unweighted([each[0] for each in texts], self._weighted, LTXVideo.name)
        with timings.span("text_encoder"):
            if self._padded:
                states, notes = self._encoder.encode(words, length, timings)
            else:
                each, notes = self._encoder.encode_each(words, length, timings, both=True)
                states, _ = stacked(each, length)
        read = np.array([len(self._tokenizer.cut(text, length)[0]) for text in words])
        mask = (np.arange(length) < read[:, None]).astype(np.int64)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}, notes + lost
