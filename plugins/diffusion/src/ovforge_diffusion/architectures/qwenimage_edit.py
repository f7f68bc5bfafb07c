"""Qwen-Image-Edit (Wu et al. 2025): pictures beside the latents, and before the eyes of Qwen2.5-VL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.contracts import CompiledModels, TaskContext
from ovforge.errors import InputError, ModelError
from ovforge.model import Timings, open_picture
from ovforge_diffusion.architectures.base import Defaults, OpenEncoder, PromptEncoder, Task, Texts
from ovforge_diffusion.architectures.qwenimage import QwenImage, filled
from ovforge_diffusion.prompts import unweighted
from ovforge_diffusion.resizing import scaled
from ovforge_diffusion.sequence import SequenceEncoder, SequenceTokenizer
from ovforge_diffusion.vision import PictureProcessor, VisionEncoder, token_places

if TYPE_CHECKING:
    from ovforge_diffusion.inputs import DiffusionOptions
    from ovforge_diffusion.request import Request

__all__ = ["QwenImageEdit"]

Array = NDArray[np.float32]

_QWEN, _VISION = "text_encoder", "vision_encoder"
_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What pictures and a prompt are put into: prompt_template_encode of diffusers' QwenImageEditPipeline."""
_DROPPED = 64
"""Tokens before the first picture, whose states the transformer does not see."""
_PICTURE, _BEGIN, _END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
_LONGEST = 8192
"""Tokens of pictures and prompt that are read at most."""
_AREA, _SMALL_AREA, _UNIT = 1024 * 1024, 384 * 384, 32
"""Pixels of pictures for the transformer, and for Qwen2.5-VL if there may be several; what sides are multiples of."""


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit, which sees one picture, and from 2509 on (Plus) several."""

    name = "Qwen-Image-Edit"
    tasks = ("image-to-image", "inpainting")
    draws_references = True

    def __init__(self, context: TaskContext, task: Task) -> None:
        super().__init__(context, task)
        self.refuse_controlnets("ControlNets go with Qwen-Image, and not with Qwen-Image-Edit")
        bundle = context.bundle
        self._several = "Plus" in self.pipeline_class
        if task == "inpainting" and self._several:
            raise ModelError(
                f"{self.name} of this kind changes pictures as a whole",
                where="model_index.json",
                hint='Set task = "image-to-image", or take Qwen-Image.',
            )
        if _VISION not in bundle:
            raise ModelError(
                "the model has none, and Qwen-Image-Edit shows pictures to it",
                where=_VISION,
                hint="Convert the diffusers folder with ovforge.",
            )
        self.references = 10 if self._several else 1
        self.image_encoders = (_VISION,)
        self._processor = PictureProcessor.of(bundle.assets, bundle.configs.get(_QWEN, {}))

    @classmethod
    def matches(cls, bundle: CompiledModels) -> bool:
        """A QwenImageTransformer2DModel of a pipeline that edits."""
        return super().matches(bundle) and str(bundle.index.get("_class_name")).startswith("QwenImageEdit")

    def usual(self, task: Task) -> Defaults:
        """Return the defaults of QwenImageEditPipeline and its kin."""
        return Defaults(50, 4.0, 0.6 if task == "inpainting" else 1.0)

    def prompt_encoder(self, opened: OpenEncoder, options: DiffusionOptions) -> PromptEncoder:
        """Return Qwen2.5-VL, which sees the pictures and reads what is to become of them."""
        tokenizer, model, _ = opened(_QWEN)
        encoder = SequenceEncoder(tokenizer, model, _QWEN)
        vision = VisionEncoder(opened(_VISION)[1], _VISION)
        return _Prompts(tokenizer, encoder, vision, self, weighted=options.prompts == "weighted")

    def remarks(self, request: Request) -> list[str]:
        """Say besides that prompts are read whole."""
        if request.given.max_sequence_length is None:
            return super().remarks(request)
        return [*super().remarks(request), "max_sequence_length has no effect: this model reads prompts whole"]

    def shown(self, image: Image.Image) -> Image.Image:
        """Return it with a megapixel."""
        return scaled(image, *_size(image, _AREA))

    limited = shown

    def size_beside(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Make pictures of the size of the last one."""
        return sizes[-1]

    def cut(self, images: Sequence[Any]) -> list[Any]:
        """Return the patches of each picture that Qwen2.5-VL is to see. Raises InputError for too many."""
        if len(images) > 1 and not self._several:
            raise InputError(
                f"{len(images)} pictures, and {self.name} sees one, with each prompt", where="image",
                hint="Give one, or take Qwen-Image-Edit-2509 or a later one.",
            )  # fmt: skip
        opened = [open_picture(image, "image") for image in images]
        small = _SMALL_AREA if self._several else _AREA
        return [self._processor.cut(scaled(image, *_size(image, small))) for image in opened]

    def asked(self, prompt: str, tokens: Sequence[int]) -> str:
        """Return what is read: pictures of so many tokens, and the prompt."""
        each = (f"{_BEGIN}{_PICTURE * count}{_END}" for count in tokens)
        if self._several:
            each = (f"Picture {number}: {text}" for number, text in enumerate(each, 1))
        return _TEMPLATE.format("".join(each) + prompt)


class _Prompts(PromptEncoder):
    """Qwen2.5-VL's states of each prompt and of the pictures before it, and which of them count."""

    def __init__(
        self,
        tokenizer: SequenceTokenizer,
        encoder: SequenceEncoder,
        vision: VisionEncoder,
        architecture: QwenImageEdit,
        *,
        weighted: bool,
    ) -> None:
        self._tokenizer, self._encoder, self._vision = tokenizer, encoder, vision
        self._architecture, self._weighted = architecture, weighted
        self._picture = tokenizer.word(_PICTURE)
        known = architecture.configs.get(_QWEN, {}).get("image_token_id")
        if known != self._picture:
            raise ModelError(
                f"its image_token_id is {known!r}, and the tokenizer's {_PICTURE} has the number {self._picture}",
                where=f"{_QWEN}/config.json", hint="Take text encoder and tokenizer of one model.",
            )  # fmt: skip

    def encode(
        self, texts: Sequence[Texts], request: Request, timings: Timings, negative: Sequence[bool]
    ) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return states, (prompts, tokens, width), and 1 for each that counts, (prompts, tokens)."""
        images: Any = getattr(request.given, "image", None)
        words, lost = unweighted([each[0] for each in texts], self._weighted, self._architecture.name)
        if any(_PICTURE in text for text in words):
            raise InputError(f"holds {_PICTURE}, which stands for a picture", where="prompt", hint="Remove it.")
        with timings.span("vision_encoder"):
            cut = self._architecture.cut(images if isinstance(images, list) else [images])
            seen = np.concatenate([self._vision(patches) for patches in cut])
        grids = [patches.grid for patches in cut]
        with timings.span("text_encoder"):
            read = [self._read(text, seen, grids) for text in words]
        return filled([states for states, _ in read]), [*dict.fromkeys(note for _, note in read if note), *lost]

    def _read(self, prompt: str, seen: Array, grids: Sequence[tuple[int, int]]) -> tuple[Array, str | None]:
        text = self._architecture.asked(prompt, [rows * columns for rows, columns in grids])
        ids, cut = self._tokenizer.cut(text, _LONGEST)
        pictures = ids == self._picture
        if pictures.sum() != len(seen):
            raise InputError(
                f"the pictures have {len(seen)} tokens, of {_LONGEST} that are read at most", where="image",
                hint="Give fewer pictures.",
            )  # fmt: skip
        visual = np.zeros((len(ids), seen.shape[1]), np.float32)
        visual[pictures] = seen
        more: Mapping[str, NDArray[Any]] = {
            "position_ids": token_places(ids, self._picture, grids)[:, None],
            "visual_states": visual[None],
        }
        note = cut and f"the prompt and its pictures have more than {_LONGEST} tokens; cut off there: {cut!r}"
        return self._encoder.states(ids, more)[_DROPPED:], note


def _size(image: Image.Image, area: int) -> tuple[int, int]:
    """Return the (width, height) of about so many pixels that is most like a picture."""
    width = math.sqrt(area * (image.width / image.height))
    sides = round(width / _UNIT) * _UNIT, round(width / (image.width / image.height) / _UNIT) * _UNIT
    if min(sides) < _UNIT:
        raise InputError(
            f"is {image.width}x{image.height}", where="image", hint="Give pictures whose sides are more alike."
        )
    return sides
