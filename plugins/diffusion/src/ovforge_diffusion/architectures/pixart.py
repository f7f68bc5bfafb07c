"""PixArt-Sigma (Chen et al. 2024): a transformer that reads T5's states by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from ovforge.contracts import CompiledModels, TaskContext
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.architectures.flow import sequence_length
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.sequence import SequenceEncoder, stacked

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["PixArt"]

_T5 = "text_encoder"
_NAMES = ("PixArtTransformer2DModel", "Transformer2DModel")
"""Its class in diffusers, and the one that the published configs name."""

_ALPHA = 120
"""Tokens that diffusers' pipeline of PixArt-Alpha reads by default."""

_BINS = {32: 256, 64: 512, 128: 1024, 256: 2048}
"""Side of latents -> side of the square of its list of sizes."""


class PixArt(Architecture):
    """PixArt-Sigma, from text; and PixArt-Alpha, whose pipeline reads fewer tokens."""

    name = "PixArt-Sigma"
    shifts_latents = False
    tasks: ClassVar[tuple[Task, ...]] = ("text-to-image",)
    text_encoders = (_T5,)
    sequence_encoders = (_T5,)
    default_size = 128
    length: int = 300

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.multiple = self.factor * int(self.config.get("patch_size", 2))
        self.check_channels()
        self.given_channels = int(self.config.get("out_channels") or self.channels)
        self.bins = _BINS.get(self.size // self.factor)
        if self.pipeline_class.startswith("PixArtAlpha"):
            self.length = _ALPHA

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A PixArtTransformer2DModel."""
        config = bundle.configs.get(cls.denoiser, {})
        return config.get("_class_name") in _NAMES and config.get("norm_type", "ada_norm_single") == "ada_norm_single"

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of PixArtSigmaPipeline."""
        return Defaults(20, 4.5)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return T5, which reads prompts in lower case."""
        encoder = SequenceEncoder(*opened(_T5)[:2], _T5)
        return _Prompts(encoder, self.length, weighted=options.prompts == "weighted")


class _Prompts(PromptEncoder):
    """T5's states of each prompt's own tokens."""

    def __init__(self, encoder: SequenceEncoder, length: int, *, weighted: bool) -> None:
        self._encoder, self._length, self._weighted = encoder, length, weighted

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and which of them count, (prompts, tokens).

        What fills up a prompt of diffusers' is masked, in T5 and in the transformer: it is left out here.
        """
        length = sequence_length(request.given.max_sequence_length, self._length)
        words, lost = unweighted([each[0] for each in texts], self._weighted, "PixArt-Sigma")
        with timings.span("text_encoder"):
            read, notes = self._encoder.encode_each(
                [text.lower().strip() for text in words], length, timings, both=True
            )
        states, mask = stacked(read)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}, notes + lost
