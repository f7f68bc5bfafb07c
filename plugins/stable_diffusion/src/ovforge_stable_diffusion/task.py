"""text-to-image: prompt -> embeddings -> denoising -> picture, in numpy and OpenVINO."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import InputError, ModelError
from ovforge.random import BatchGenerator, fresh_seed
from ovforge.results import ImagesResult, Timings
from ovforge.stages import Progress, RandomStream, Sampling, TaskContext, ignore_progress
from ovforge_stable_diffusion.inputs import TextToImageInputs, TextToImageOptions
from ovforge_stable_diffusion.text import DEFAULT_LENGTH, TextEncoder
from ovforge_stable_diffusion.unet import Denoiser, guidance_embedding

__all__ = ["TextToImage"]

Array = NDArray[np.float32]

_EXERCISES = ("a cat on a blue background", "a red car", "a house by the sea, oil painting", "a bowl of fruit, 8k")


@dataclass(frozen=True)
class Request:
    """A call with every default filled in. Sizes in pixels; one prompt, negative prompt and seed a picture."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    steps: int
    guidance_scale: float
    width: int
    height: int
    seeds: tuple[int, ...]
    count: int

    def as_inputs(self) -> dict[str, Any]:
        """Return inputs that make these pictures again."""
        prompts = list(self.prompts[:: self.count])
        negatives = list(self.negatives[:: self.count])
        return {
            "prompt": prompts[0] if len(prompts) == 1 else prompts,
            **({"negative_prompt": negatives[0] if len(prompts) == 1 else negatives} if any(negatives) else {}),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "width": self.width,
            "height": self.height,
            "count": self.count,
            "seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
        }


class TextToImage:
    """Stable Diffusion 1.x and latent consistency models. Calls are served one at a time."""

    def __init__(self, options: TextToImageOptions, context: TaskContext) -> None:
        bundle = context.bundle
        self._bundle = bundle
        self._make_scheduler = context.scheduler
        self._unet_config = bundle.configs.get("unet", {})
        self._vae_config = bundle.configs.get("vae_decoder", {})
        self._factor = 2 ** (len(self._vae_config.get("block_out_channels", (0,) * 4)) - 1)
        self._guidance_width: int | None = self._unet_config.get("time_cond_proj_dim")
        self._text: TextEncoder | None = None
        self._denoiser: tuple[tuple[int, ...], Denoiser] | None = None
        self._decoder: tuple[tuple[int, ...], ov.InferRequest] | None = None
        self._lock = threading.Lock()
        self._fixed = self._expected(context.inputs) if options.static else None
        bundle.start("unet", self._unet_shapes(self._fixed))  # the longest first
        bundle.start("tokenizer")
        bundle.start("text_encoder")
        bundle.start("vae_decoder", self._decoder_shapes(self._fixed))

    def __call__(
        self, inputs: TextToImageInputs, progress: Callable[[Progress], None] = ignore_progress
    ) -> ImagesResult:
        """Make pictures.

        Raises InputError for what the model cannot do, ModelError where it computes no numbers.
        """
        with self._lock:
            timings = Timings()
            request = self._request(inputs)
            sampling = self._make_scheduler().start(request.steps)
            progress(Progress("text encoding", 0, request.steps))
            states, warnings = self._encode(request, timings)
            rng = BatchGenerator(request.seeds)
            shape = self._latents_shape(request)
            denoiser = self._denoiser_for(len(states), shape)  # waiting for compilation is no part of denoising
            with timings.span("denoise"):
                latents = self._denoise(request, sampling, states, rng, timings, progress, denoiser, shape)
            progress(Progress("decoding", request.steps, request.steps))
            decoder = self._decoder_for(shape)
            images = [self._decode(row, decoder, timings) for row in latents]
            return ImagesResult(
                timings=timings,
                provenance={"inputs": request.as_inputs()},
                warnings=warnings,
                images=images,
                seeds=request.seeds,
            )

    def exercise(self, samples: int) -> None:
        """Make `samples` pictures from built-in prompts, with seeds 0, 1, 2..."""
        for number in range(samples):
            self(TextToImageInputs(prompt=_EXERCISES[number % len(_EXERCISES)], seed=number))

    # -- what was asked for --------------------------------------------------------------------------------------

    def _request(self, inputs: TextToImageInputs) -> Request:
        defaults = self._defaults()
        prompts = [inputs.prompt] if isinstance(inputs.prompt, str) else list(inputs.prompt)
        pictures = len(prompts) * inputs.count
        size = int(self._unet_config.get("sample_size", 64)) * self._factor
        guidance = defaults["guidance_scale"] if inputs.guidance_scale is None else inputs.guidance_scale
        return Request(
            prompts=tuple(prompt for prompt in prompts for _ in range(inputs.count)),
            negatives=self._negatives(inputs, prompts, guidance),
            steps=inputs.steps or defaults["steps"],
            guidance_scale=guidance,
            width=self._side("width", inputs.width or size),
            height=self._side("height", inputs.height or size),
            seeds=_seeds(inputs.seed, pictures),
            count=inputs.count,
        )

    def _defaults(self) -> dict[str, Any]:
        """Return the model's own defaults (ovforge.json beside model_index.json), else diffusers'."""
        defaults = {"steps": 4, "guidance_scale": 8.5} if self._guidance_width else {"steps": 50, "guidance_scale": 7.5}
        own = self._bundle.assets.get("ovforge.json")
        return {**defaults, **(json.loads(own).get("defaults", {}) if own else {})}

    def _negatives(self, inputs: TextToImageInputs, prompts: list[str], guidance: float) -> tuple[str, ...]:
        """Return the negative prompt of each picture; refuse one that would do nothing."""
        given = inputs.negative_prompt
        if given is not None and self._guidance_width:
            raise InputError(
                "a consistency model has its guidance built in, and takes no negative prompt", where="negative_prompt"
            )
        if given is not None and guidance <= 1:
            raise InputError(
                f"no effect with guidance_scale = {guidance:g}",
                where="negative_prompt",
                hint="Set guidance_scale above 1, or leave the negative prompt out.",
            )
        each = [given or ""] * len(prompts) if given is None or isinstance(given, str) else given
        if len(each) != len(prompts):
            raise InputError(f"{len(each)} negative prompts for {len(prompts)} prompts", where="negative_prompt")
        return tuple(negative for negative in each for _ in range(inputs.count))

    def _side(self, name: str, pixels: int) -> int:
        """Return a width or height that the autoencoder can make."""
        if pixels % self._factor:
            lower = max(pixels // self._factor * self._factor, self._factor)
            raise InputError(
                f"{pixels} is not a multiple of {self._factor}",
                where=name,
                hint=f"The nearest sizes are {lower} and {lower + self._factor}.",
            )
        return pixels

    # -- the three parts -----------------------------------------------------------------------------------------

    def _encode(self, request: Request, timings: Timings) -> tuple[Array, list[str]]:
        """Return text states, unconditional ones first where there is guidance, and what did not fit."""
        if self._text is None:
            self._text = TextEncoder(self._bundle["tokenizer"], self._bundle["text_encoder"])
        guided = self._guided(request)
        distinct = list(dict.fromkeys([*(request.negatives if guided else ()), *request.prompts]))
        states = dict(zip(distinct, self._text.encode(distinct, timings), strict=True))
        order = [*(request.negatives if guided else ()), *request.prompts]
        warnings = [
            f"the prompt is longer than the model reads; cut off: {cut!r}"
            for prompt in distinct
            if (cut := self._text.cut(prompt)) is not None
        ]
        return np.stack([states[prompt] for prompt in order]), warnings

    def _guided(self, request: Request) -> bool:
        return not self._guidance_width and request.guidance_scale > 1

    def _denoise(
        self,
        request: Request,
        sampling: Sampling,
        states: Array,
        rng: RandomStream,
        timings: Timings,
        progress: Callable[[Progress], None],
        denoiser: Denoiser,
        shape: tuple[int, ...],
    ) -> Array:
        """Return clean latents, float32 (pictures, channels, height / factor, width / factor)."""
        pictures = len(request.prompts)
        denoiser.check(sampling.timesteps)
        denoiser.condition(
            states,
            guidance_embedding(request.guidance_scale, self._guidance_width) if self._guidance_width else None,
        )
        latents = rng.randn(shape) * np.float32(sampling.init_noise_sigma)
        total = len(sampling.timesteps)  # some methods call the network more often than once a step
        for index, timestep in enumerate(sampling.timesteps):
            with timings.span("denoise.unet"):
                # Where there is guidance the batch holds the latents twice; without, once.
                denoiser.latents.reshape(-1, *shape)[...] = sampling.scale_input(latents, index)
                output = self._predict(denoiser, timestep, request)
                if self._guided(request):
                    without, along = output[:pictures], output[pictures:]
                    output = without + np.float32(request.guidance_scale) * (along - without)
            with timings.span("denoise.scheduler"):
                latents = sampling.step(output, index, latents, rng)
            if not np.isfinite(latents).all():
                raise ModelError(
                    f"step {index + 1} of {total} gave numbers that are not finite",
                    where="unet",
                    hint="Set device.precision = 'f32'; if it stays, the model's weights are damaged.",
                )
            progress(Progress("denoising", index + 1, total))
        return latents

    def _latents_shape(self, request: Request) -> tuple[int, ...]:
        return (
            len(request.prompts),
            int(self._unet_config.get("in_channels", 4)),
            request.height // self._factor,
            request.width // self._factor,
        )

    def _expected(self, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the UNet's input shape for the calls that the config foresees; None where it foresees no one size."""
        size = int(self._unet_config.get("sample_size", 64)) * self._factor
        width, height, count = (
            inputs.get(name) or default for name, default in (("width", size), ("height", size), ("count", 1))
        )
        if not all(isinstance(value, int) and value > 0 for value in (width, height, count)):
            return None
        prompts = inputs.get("prompt")
        pictures = count * (len(prompts) if isinstance(prompts, list) else 1)
        guidance = inputs.get("guidance_scale")
        guided = not self._guidance_width and not (isinstance(guidance, int | float) and guidance <= 1)
        channels = int(self._unet_config.get("in_channels", 4))
        return (pictures * (2 if guided else 1), channels, height // self._factor, width // self._factor)

    def _unet_shapes(self, sample: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        """Return fixed shapes of every input for a sample of this shape; None where it is not the expected one."""
        width = self._unet_config.get("cross_attention_dim")
        if sample is None or sample != self._fixed or not isinstance(width, int):
            return None
        length = self._bundle.configs.get("text_encoder", {}).get("max_position_embeddings", DEFAULT_LENGTH)
        shapes = {"sample": sample, "timestep": (1,), "encoder_hidden_states": (sample[0], length, width)}
        return shapes | ({"timestep_cond": (sample[0], self._guidance_width)} if self._guidance_width else {})

    def _decoder_shapes(self, sample: tuple[int, ...] | None) -> dict[str, tuple[int, ...]] | None:
        if sample is None or self._fixed is None or sample[1:] != self._fixed[1:]:
            return None
        return {"latent_sample": (1, *sample[1:])}

    def _denoiser_for(self, batch: int, shape: tuple[int, ...]) -> Denoiser:
        key = (batch, *shape[1:])
        if self._denoiser is None or self._denoiser[0] != key:
            self._denoiser = (key, Denoiser(self._bundle.get("unet", self._unet_shapes(key)), *key))
        return self._denoiser[1]

    def _decoder_for(self, shape: tuple[int, ...]) -> ov.InferRequest:
        if self._decoder is None or self._decoder[0] != shape[1:]:
            model = self._bundle.get("vae_decoder", self._decoder_shapes(shape))
            self._decoder = (shape[1:], model.create_infer_request())
        return self._decoder[1]

    def _predict(self, denoiser: Denoiser, timestep: float, request: Request) -> Array:
        """Run the UNet; a size that its skip connections cannot join is an input error."""
        levels = len(self._unet_config.get("block_out_channels", (0,) * 4))
        grid = self._factor * 2 ** (levels - 1)
        try:
            return denoiser.predict(timestep)
        except RuntimeError as error:
            if request.width % grid or request.height % grid:
                self._denoiser = None
                raise InputError(
                    f"this model's UNet cannot work at {request.width}x{request.height}",
                    where="width, height",
                    hint=f"It was converted for multiples of {grid}; the diffusers loader converts for any size.",
                ) from error
            raise

    def _decode(self, latents: Array, decoder: ov.InferRequest, timings: Timings) -> Image.Image:
        """Return one picture; pictures are decoded one by one, since a batch would only take more memory."""
        with timings.span("vae_decoder"):
            scaled = latents[None] / np.float32(self._vae_config.get("scaling_factor", 0.18215))
            scaled += np.float32(self._vae_config.get("shift_factor") or 0.0)
            decoder.infer({0: scaled})
            sample = decoder.get_output_tensor(0).data[0]
            if not np.isfinite(sample).all():
                raise ModelError("the decoder gave numbers that are not finite", where="vae_decoder")
            pixels = np.clip(sample.transpose(1, 2, 0) * np.float32(0.5) + np.float32(0.5), 0, 1)
            return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _seeds(seed: int | list[int] | None, pictures: int) -> tuple[int, ...]:
    """Return a seed for each picture: those given, or the one given and the numbers after it."""
    if isinstance(seed, list):
        if len(seed) != pictures:
            raise InputError(f"{len(seed)} seeds for {pictures} pictures", where="seed", hint="Give one for each.")
        return tuple(seed)
    first = fresh_seed() if seed is None else seed
    return tuple(first + number for number in range(pictures))
