"""The models of a pipeline: which shapes they are compiled for, when, and when they are let go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import openvino as ov

from ovforge.contracts import CompiledModels
from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import PREVIEW, Architecture, tokenizer_of
from ovforge_diffusion.architectures.bins import binned
from ovforge_diffusion.denoiser import Denoiser
from ovforge_diffusion.inputs import DiffusionOptions
from ovforge_diffusion.scale import FRAMED
from ovforge_diffusion.sequence import SequenceTokenizer
from ovforge_diffusion.shallow import CACHED, StepRule, shallow_role
from ovforge_diffusion.text import learned_tokens
from ovforge_diffusion.tokenizer import FileTokenizer, GraphTokenizer, Learned, Tokenizer, has_files
from ovforge_diffusion.vae import Autoencoder

__all__ = ["Models"]

Shapes = dict[str, tuple[int, ...]]


class Models:
    """Compiled models and tokenizers by role. What the config says of calls is what they are compiled for."""

    def __init__(
        self,
        bundle: CompiledModels,
        architecture: Architecture,
        options: DiffusionOptions,
        inputs: Mapping[str, Any],
        *,
        encodes: bool,
    ) -> None:
        self._bundle, self._architecture, self._options, self._inputs = bundle, architecture, options, inputs
        self.encodes = encodes
        preview = self._preview if architecture.previewing else None
        self.autoencoder = Autoencoder(architecture, self._decoder, self._encoder, options.tile, preview)
        self._expected = self._expected_call() if options.static else None
        self._denoiser: tuple[tuple[int, ...], Denoiser] | None = None
        self._tokenizers: dict[str, Future[Any]] = {}
        bundle.on_demand()  # a tokenizer whose files are there is not compiled
        if not options.low_memory:
            self._start()

    def _start(self) -> None:
        bundle, architecture = self._bundle, self._architecture
        bundle.start(architecture.denoiser, self._denoiser_shapes(self._expected))  # the longest first
        if (outer := shallow_role(architecture.denoiser)) in bundle:
            bundle.start(outer, self._shallow_shapes(self._expected))
        for role in architecture.controlnets:
            bundle.start(role, self._control_shapes(role, self._expected))
        for encoder in architecture.encoders:
            if encoder in architecture.sequence_encoders or has_files(bundle.assets, tokenizer_of(encoder)):
                self._read_tokenizer(tokenizer_of(encoder))
            elif tokenizer_of(encoder) in bundle:
                bundle.start(tokenizer_of(encoder))
            bundle.start(encoder)
        for role in architecture.image_encoders:
            bundle.start(role)
        if self.encodes or architecture.encodes_conditions:
            bundle.start("vae_encoder", self._encoder_shapes(self._pixels))
        for role in ("vae_decoder", PREVIEW) if architecture.previewing else ("vae_decoder",):
            folding = architecture.folding
            bundle.start(role, self._decoder_shapes(role, self._size and tuple(side * folding for side in self._size)))

    # -- what a run asks for --------------------------------------------------------------------------------------

    def encoder(self, role: str) -> tuple[Any, ov.CompiledModel, Learned | None]:
        """Return a text encoder's tokenizer, its model, and the words that it was taught.

        What sees pictures for it has a model alone.
        """
        if role in self._architecture.image_encoders:
            return None, self._bundle[role], None
        tokenizer = tokenizer_of(role)
        if role in self._architecture.sequence_encoders:
            return self._read_tokenizer(tokenizer).result(), self._bundle[role], None
        return self.tokenizer(tokenizer), self._bundle[role], self.learned.get(tokenizer)

    @property
    def learned(self) -> dict[str, Learned]:
        """The words that tokenizers were taught, by their roles."""
        return learned_tokens(self._bundle.assets)

    def tokenizer(self, role: str) -> Tokenizer:
        """Return the tokenizer of the model's files, or of its OpenVINO model if there are none."""
        if has_files(self._bundle.assets, role):
            tokenizer: Tokenizer = self._read_tokenizer(role).result()
            return tokenizer
        warnings.warn(
            f"{role}: the model has no tokenizer.json, nor vocab.json with merges.txt; its OpenVINO tokenizer may read "
            "rare letters and added tokens in another way than transformers",
            stacklevel=2,
        )
        return GraphTokenizer(self._bundle[role], self.learned.get(role))

    def denoiser(
        self,
        pictures: int,
        size: tuple[int, ...],
        halves: int,
        *,
        split: bool,
        beside: Sequence[tuple[int, int]] = (),
        length: int | None = None,
        before: int = 0,
        timed: bool = False,
    ) -> Denoiser:
        """Return the denoiser for pictures of a size (height, width) in latents; `split` runs each half by itself.

        `beside` are the sizes of the pictures that it sees beside them, `length` the tokens of text that a call asks
        for, None for the usual number; `before` are tokens that stand before the latents, and `timed` says that tokens
        have timesteps of their own.
        """
        architecture = self._architecture
        calls = halves if split else 1
        shape = architecture.sample_shape(pictures, *size)
        latents = architecture.packed_shape(pictures, *size)
        if beside:
            shape = architecture.widened(shape, beside)
        if before:
            shape, latents = ((first, tokens + before, *rest) for first, tokens, *rest in (shape, latents))
        usual = architecture.length
        foreseen = not beside and not before and (length or usual) == (self._inputs.get("max_sequence_length") or usual)
        key = (foreseen, halves, calls, pictures, before, timed, *size, *(side for each in beside for side in each))
        if self._denoiser is None or self._denoiser[0] != key:
            shapes = self._denoiser_shapes((pictures * halves // calls, *size)) if foreseen else None
            if shapes is None and self._expected and self._denoiser is None:
                self._bundle.release(architecture.denoiser)  # nobody has asked for the size that was foreseen
            model = self._bundle.get(architecture.denoiser, shapes)
            denoiser = Denoiser(model, architecture, shape, latents, halves, calls, shape[1] if timed else 1)
            if (outer := shallow_role(architecture.denoiser)) in self._bundle:
                shapes = self._shallow_shapes((pictures * halves // calls, *size)) if foreseen else None
                denoiser.cache_steps(self._bundle.get(outer, shapes), StepRule.of(self._bundle.configs[outer]))
            self._denoiser = (key, denoiser)
        return self._denoiser[1]

    def any_size(self, role: str) -> ov.CompiledModel:
        """Return a model for any size."""
        return self._bundle[role]

    def controlnets(self, pictures: int, size: tuple[int, ...], halves: int, *, split: bool) -> dict[str, Any]:
        """Return the pipeline's ControlNets by role, for the same."""
        sample = (pictures * (1 if split else halves), *size)
        nets = self._architecture.controlnets
        return {role: self._bundle.get(role, self._control_shapes(role, sample)) for role in nets}

    def require_encoder(self) -> None:
        """Raise ModelError if the pipeline has no vae_encoder, which makes latents of conditions."""
        if "vae_encoder" not in self._bundle:
            raise ModelError(
                "the model has none, and it makes the latents of conditions",
                where="vae_encoder",
                hint="Bring one of the same model by [load.parts]: vae_encoder = FOLDER.",
            )

    def forget_denoiser(self) -> None:
        """Make the denoiser anew the next time."""
        self._denoiser = None

    def release(self, *roles: str) -> None:
        """Free what is not needed any more in this run, if memory is to stay low."""
        if not self._options.low_memory:
            return
        if self._architecture.denoiser in roles:
            self._denoiser = None
        if any(role.startswith("tokenizer") for role in roles):
            self._tokenizers.clear()
        if "vae_encoder" in roles or "vae_decoder" in roles:
            self.autoencoder.release()
        for role in roles:
            if role in self._bundle:
                self._bundle.release(role)

    def release_all(self) -> None:
        """Free all that a run still holds if it ends early, likewise."""
        self.release(*self._bundle, *map(tokenizer_of, self._architecture.encoders))

    def _read_tokenizer(self, role: str) -> Future[Any]:
        """Begin to read a tokenizer's files, which takes a while for 49,000 words; other models compile meanwhile."""
        if role not in self._tokenizers:
            assets, pool = self._bundle.assets, ThreadPoolExecutor(1, thread_name_prefix="ovforge-tokenizer")
            encoder = {tokenizer_of(each): each for each in self._architecture.sequence_encoders}.get(role)
            if encoder is None:
                reading: Callable[..., Any] = partial(FileTokenizer, learned=self.learned.get(role))
            else:
                words = self._bundle.configs.get(encoder, {}).get("vocab_size")
                reading = partial(SequenceTokenizer, words=words)
            self._tokenizers[role] = pool.submit(reading, assets, role)
            pool.shutdown(wait=False)
        return self._tokenizers[role]

    def _decoder(self, shape: tuple[int, ...]) -> ov.CompiledModel:
        return self._bundle.get("vae_decoder", self._decoder_shapes("vae_decoder", shape[2:]))

    def _preview(self, shape: tuple[int, ...]) -> ov.CompiledModel:
        return self._bundle.get(PREVIEW, self._decoder_shapes(PREVIEW, shape[2:]))

    def _encoder(self, shape: tuple[int, ...]) -> ov.CompiledModel:
        return self._bundle.get("vae_encoder", self._encoder_shapes(shape[2:]))

    # -- shapes ---------------------------------------------------------------------------------------------------

    def _expected_call(self) -> tuple[int, ...] | None:
        """Return (rows, height, width) in latents of the calls that the config foresees; None if of no one size.

        Videos have frames before height.
        """
        architecture, inputs = self._architecture, self._inputs
        width, height, count = (
            inputs.get(name) or default
            for name, default in (*zip(("width", "height"), architecture.sides, strict=True), ("count", 1))
        )
        frames = architecture.foreseen_frames(inputs)
        if frames is None or not all(isinstance(value, int) and value > 0 for value in (width, height, count)):
            return None
        if architecture.bins and inputs.get("resolution_binning") is True:
            width, height = binned(width, height, architecture.bins)
        prompts = inputs.get("prompt")
        pictures = count * (len(prompts) if isinstance(prompts, list) else 1)
        varies = any(inputs.get(name) for name in ("skip_guidance_layers", "guidance_start", "guidance_stop"))
        joint = self._options.guidance == "joint" and not varies
        halves = architecture.foreseen_halves(inputs) if joint else 1
        unit = architecture.multiple // architecture.factor
        high, wide = (int(side) // architecture.multiple * unit for side in (height, width))
        return (pictures * halves, *frames, high, wide)

    @property
    def _size(self) -> tuple[int, ...] | None:
        return self._expected and self._expected[1:]

    @property
    def _pixels(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the calls that the config foresees; None for videos, decoded at any size."""
        factor = self._architecture.factor
        if self._size is None or self._architecture.makes_videos:
            return None
        return self._size[0] * factor, self._size[1] * factor

    def _denoiser_shapes(self, sample: tuple[int, ...] | None) -> Shapes | None:
        """Return fixed shapes of every input for (rows, height, width); None if these are not the expected ones."""
        if sample is None or sample != self._expected:
            return None
        return self._architecture.input_shapes(sample[0], sample[1:], self._options, self._inputs)

    def _shallow_shapes(self, sample: tuple[int, ...] | None) -> Shapes | None:
        """Return the same of the denoiser's outer part, which also takes what the inner part gave."""
        shapes = self._denoiser_shapes(sample)
        if shapes is None or sample is None:
            return None
        config = self._bundle.configs[shallow_role(self._architecture.denoiser)]
        return {
            **{name: shape for name, shape in shapes.items() if name in config["inputs"]},
            CACHED: self._architecture.kept_shape(sample[0], sample[1:], config["channels"]),
        }

    def _control_shapes(self, role: str, sample: tuple[int, ...] | None) -> Shapes | None:
        shapes = self._denoiser_shapes(sample)
        if shapes is None or self._pixels is None:
            return None
        return self._architecture.control_shapes(role, shapes, self._pixels)

    def _decoder_shapes(self, role: str, size: tuple[int, ...] | None) -> Shapes | None:
        """Return a fixed shape for latents of the expected size, or of its tiles."""
        if size is None or self._pixels is None or self._size is None:
            return None
        architecture, tile = self._architecture, self.autoencoder.tile(*self._pixels)
        factor = architecture.factor // architecture.folding
        whole = tuple(side * architecture.folding for side in self._size)
        sides = tuple(min(side, tile // factor) if tile else side for side in whole)
        channels = architecture.latent_channels // architecture.folding**2
        shape = (1, channels, *self._frame(role), *sides)
        return {"latent_sample": shape} if size in (sides, whole) else None

    def _encoder_shapes(self, size: tuple[int, ...] | None) -> Shapes | None:
        if size is None or self._pixels is None:
            return None
        tile = self.autoencoder.tile(*self._pixels)
        sides = tuple(min(side, tile) if tile else side for side in self._pixels)
        return {"sample": (1, 3, *self._frame("vae_encoder"), *sides)} if size in (sides, self._pixels) else None

    def _frame(self, role: str) -> tuple[int, ...]:
        """Return the axis of one frame that an autoencoder for videos has before height and width."""
        return (1,) if self._bundle.configs.get(role, {}).get("_class_name") == FRAMED else ()
